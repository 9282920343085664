//! The expressions of a shop with an ERP and a CRM give what these systems want.

use serde_json::{Value, json};

use super::*;
use crate::config::{Section, Spanned, parse_text};

const SYSTEM: &str = r#"
define: |
  def dt: [.year, .month - 1, .day, .hour, .minute, .second, 0, 0] | mktime | todate;
  def undt: fromdate | gmtime | {__class__: "datetime", year: .[0], month: (.[1] + 1), day: .[2],
            hour: .[3], minute: .[4], second: (.[5] | floor), microsecond: 0};
  def dec: {__class__: "Decimal", decimal: tostring};
  def q: tojson | @base64;
headers: { X-Tryton-Context: "{{ {company: 1} | tojson | @base64 }}" }
login: '{id: 1, method: "common.db.login", params: ["admin", {password: $secret}]}'
header: "Authorization: Session {{ \"admin:\\(.result[0]):\\(.result[1])\" | @base64 }}"
reject: "$probe.ok"
customer: |
  { name: .after.name, code: "C\(.after.id)" }
  + if $link then {} else
      { addresses: [["create", [{ street: .after.street, city: .after.city }]]] } end
by_code: '{{ [["code", "=", "C\(.key.id)"]] | q }}'
address: "{address: .addresses[0]}"
party: "/party.party/{{ $link.id }}"
cursor: "(.write_date // .create_date) | dt"
since: '{{ ($cursor | undt) as $t | [["OR", ["write_date", ">=", $t], ["create_date", ">=", $t]]] | q }}'
product: '{ sku: .code, name, price: .list_price.decimal }'
stock: '{ product_id: local("product"; .id), on_hand: .quantity }'
placed: .after.placed_at != null
order: |
  link("party"; .after.customer_id) as $party
  | { reference: .after.number, party: $party.id, company: 1, currency: 1,
      invoice_address: $party.address, shipment_address: $party.address, invoice_method: "manual",
      lines: [["create", [ .lines[] | link("product"; .product_id) as $p
        | { product: $p.id, unit: $p.uom, quantity, unit_price: (.price | dec) } ]]] }
contact: '{ email: .after.email, name: .after.name, external_ref: .after.id }'
"#;

struct Shop {
    section: Section,
    compiler: Compiler,
}

impl Shop {
    fn new() -> Self {
        let mut section = Section::new(parse_text(SYSTEM, "shop.yaml").unwrap(), "shop").unwrap();
        let compiler = Compiler::new(Some(&section.require("define").unwrap())).unwrap();
        Shop { section, compiler }
    }

    fn jq(&mut self, name: &str, input: &Value, scope: &Scope<'_>) -> Result<Value, MapError> {
        self.compiler.jq(&self.section.require::<Spanned<String>>(name).unwrap()).unwrap().first(input, scope)
    }

    fn text(&mut self, name: &str, input: &Value, scope: &Scope<'_>) -> String {
        let text = self.section.require::<Spanned<String>>(name).unwrap();
        self.compiler.template(&text, Escape::Path).unwrap().render(input, scope).unwrap()
    }
}

fn decoded(base64_and_percent: &str) -> String {
    use base64::Engine;
    let text = percent_encoding::percent_decode_str(base64_and_percent).decode_utf8().unwrap();
    String::from_utf8(base64::engine::general_purpose::STANDARD.decode(text.as_bytes()).unwrap()).unwrap()
}

#[test]
fn a_customer_becomes_a_party_with_an_address_once() {
    let mut shop = Shop::new();
    let input = json!({"key": {"id": 7}, "after": {"id": 7, "name": "Ännchen", "street": "Weg 1", "city": "Ulm"}});
    let map = shop.compiler.jq(&shop.section.require("customer").unwrap()).unwrap();
    let new = map.first(&input, &Scope::default()).unwrap();
    assert_eq!(
        new.to_string(),
        r#"{"name":"Ännchen","code":"C7","addresses":[["create",[{"street":"Weg 1","city":"Ulm"}]]]}"#
    );
    let link = json!({"id": 70});
    let known = map.first(&input, &Scope { link: Some(&link), ..Scope::default() }).unwrap();
    assert_eq!(known.to_string(), r#"{"name":"Ännchen","code":"C7"}"#);
    assert_eq!(decoded(&shop.text("by_code", &input, &Scope::default())), r#"[["code","=","C7"]]"#);
    assert_eq!(shop.text("party", &input, &Scope { link: Some(&link), ..Scope::default() }), "/party.party/70");
    let answer = json!({"id": 70, "addresses": [5, 6]});
    assert_eq!(shop.jq("address", &answer, &Scope::default()).unwrap(), json!({"address": 5}));
    let contact = json!({"after": {"id": 7, "email": "a@b", "name": "A"}});
    assert_eq!(
        shop.jq("contact", &contact, &Scope::default()).unwrap(),
        json!({"email": "a@b", "name": "A", "external_ref": 7})
    );
}

#[test]
fn an_order_waits_for_its_links_and_keeps_prices_exact() {
    let mut shop = Shop::new();
    let input: Value = serde_json::from_str(
        r#"{"after": {"number": "S1", "customer_id": 7, "placed_at": "2024-01-01T00:00:00Z"},
            "lines": [{"product_id": 1, "quantity": 2, "price": 19.90}, {"product_id": 2, "quantity": 1.5, "price": 100}]}"#,
    )
    .unwrap();
    assert_eq!(shop.jq("placed", &input, &Scope::default()), Ok(json!(true)));
    let map = shop.compiler.jq(&shop.section.require("order").unwrap()).unwrap();
    let Err(MapError::Needs(wanted)) = map.first(&input, &Scope::default()) else { panic!() };
    assert_eq!(wanted.len(), 3, "{wanted:?}");
    let mut links = Links::default();
    links.put_link("party", &json!(7), Some(json!({"id": 70, "address": 5})));
    links.put_link("product", &json!(1), Some(json!({"id": 10, "uom": 3})));
    links.put_link("product", &json!(2), Some(json!({"id": 20, "uom": 3})));
    let order = map.first(&input, &Scope { links: Some(&links), ..Scope::default() }).unwrap();
    assert_eq!(
        order.to_string(),
        r#"{"reference":"S1","party":70,"company":1,"currency":1,"invoice_address":5,"shipment_address":5,"invoice_method":"manual","lines":[["create",[{"product":10,"unit":3,"quantity":2,"unit_price":{"__class__":"Decimal","decimal":"19.90"}},{"product":20,"unit":3,"quantity":1.5,"unit_price":{"__class__":"Decimal","decimal":"100"}}]]]}"#
    );
    links.put_link("party", &json!(7), None);
    let waits = map.first(&input, &Scope { links: Some(&links), ..Scope::default() });
    assert!(matches!(waits, Err(MapError::Waits(Wanted::Link { .. }))), "{waits:?}");
}

#[test]
fn a_pull_goes_by_the_erps_own_times() {
    let mut shop = Shop::new();
    let time = json!({"__class__": "datetime", "year": 2024, "month": 2, "day": 29, "hour": 23, "minute": 5, "second": 9, "microsecond": 7});
    let cursor = shop.jq("cursor", &json!({"write_date": null, "create_date": time}), &Scope::default()).unwrap();
    assert_eq!(cursor, json!("2024-02-29T23:05:09Z"));
    let since = shop.text("since", &Value::Null, &Scope { cursor: Some(&cursor), ..Scope::default() });
    let written =
        r#"{"__class__":"datetime","year":2024,"month":2,"day":29,"hour":23,"minute":5,"second":9,"microsecond":0}"#;
    assert_eq!(decoded(&since), format!(r#"[["OR",["write_date",">=",{written}],["create_date",">=",{written}]]]"#));
    let product = json!({"id": 3, "code": "A", "name": "Ale", "list_price": {"decimal": "4.50"}, "quantity": 8.0});
    assert_eq!(
        shop.jq("product", &product, &Scope::default()).unwrap(),
        json!({"sku": "A", "name": "Ale", "price": "4.50"})
    );
    let mut links = Links::default();
    links.put_local("product", &json!(3), Some(json!(33)));
    let stock = shop.jq("stock", &product, &Scope { links: Some(&links), ..Scope::default() }).unwrap();
    assert!(equal(&stock, &json!({"product_id": 33, "on_hand": 8})), "{stock}");
}

#[test]
fn a_login_sends_the_secret_and_takes_the_session() {
    let mut shop = Shop::new();
    let scope = Scope { secret: Some("hunter2"), ..Scope::default() };
    let login = shop.jq("login", &Value::Null, &scope).unwrap();
    assert_eq!(login, json!({"id": 1, "method": "common.db.login", "params": ["admin", {"password": "hunter2"}]}));
    let text = shop.section.require::<Spanned<String>>("header").unwrap();
    let header = shop.compiler.template(&text, Escape::None).unwrap();
    let header = header.render(&json!({"result": [1, "abc"]}), &Scope::default()).unwrap();
    assert_eq!(decoded(header.strip_prefix("Authorization: Session ").unwrap()), "admin:1:abc");
    let probe = json!({"ok": true});
    assert_eq!(shop.jq("reject", &Value::Null, &Scope { probe: Some(&probe), ..Scope::default() }), Ok(json!(true)));
    let headers = shop.section.node("headers").unwrap().unwrap();
    let headers = shop.compiler.tree(&headers).unwrap().render(&Value::Null, &Scope::default()).unwrap();
    assert_eq!(decoded(&headers[0].1), r#"{"company":1}"#);
}
