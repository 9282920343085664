//! The registries: our own by its REST API and by a client that we did not write, and a foreign one through our
//! client.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tidegate::avro::{EncodingSettings, EventMeta, SnapshotMarker, TablePlan, TransactionMeta, schemas};
use tidegate::event::{
    Cell, Column, ColumnType, HeaderSet, Lsn, Oid, Operation, RecordBatch, ReplicaIdentity, Table, TypeKind,
};
use tidegate::registry::{BuiltinRegistry, Registry, RegistryAuth, RegistryClient, RegistryError, SchemaId};

use crate::support::{Apicurio, Scripted, Told, eventually, http};

const ROW: &str = r#"{"type":"record","name":"Value","namespace":"shop","fields":[{"name":"id","type":"int"}]}"#;
const WIDER: &str = r#"{"type":"record","name":"Value","namespace":"shop","fields":[{"name":"id","type":"int"},
    {"name":"note","type":["null","string"],"default":null}]}"#;
const BREAKING: &str = r#"{"type":"record","name":"Value","namespace":"shop","fields":[{"name":"id","type":"int"},
    {"name":"must","type":"string"}]}"#;

/// Serves a registry until the test ends; the URL.
pub async fn serve(registry: &BuiltinRegistry) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let routes = tidegate::rest::registry::routes(registry.clone());
    tokio::spawn(async move { axum::serve(listener, routes).await });
    url
}

async fn ask(method: &str, url: String, body: Value) -> (u16, Value) {
    let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
    let mut request = http().request(method, &url);
    if !body.is_null() {
        request = request.header("content-type", "application/vnd.schemaregistry.v1+json").body(body.to_string());
    }
    let answer = request.send().await.unwrap();
    let media = answer.headers()["content-type"].to_str().unwrap().to_owned();
    assert_eq!(media, "application/vnd.schemaregistry.v1+json", "{url}");
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test]
async fn the_rest_api_is_confluents() {
    let folder = tempfile::tempdir().unwrap();
    let registry = BuiltinRegistry::open(folder.path()).unwrap();
    let url = serve(&registry).await;
    let schema = |text: &str| json!({ "schema": text });
    let at = |path: &str| format!("{url}{path}");

    assert_eq!(ask("GET", at("/subjects"), json!(null)).await, (200, json!([])));
    assert_eq!(ask("GET", at("/schemas/types"), json!(null)).await, (200, json!(["AVRO"])));
    assert_eq!(ask("GET", at("/config"), json!(null)).await, (200, json!({ "compatibilityLevel": "BACKWARD" })));
    assert_eq!(ask("GET", at("/mode"), json!(null)).await, (200, json!({ "mode": "READWRITE" })));

    // One text, one id, whatever the subject and the white space.
    let orders = at("/subjects/orders-value/versions");
    assert_eq!(ask("POST", orders.clone(), schema(ROW)).await, (200, json!({ "id": 1 })));
    assert_eq!(ask("POST", orders.clone(), schema(&ROW.replace(',', " ,\n "))).await, (200, json!({ "id": 1 })));
    assert_eq!(ask("POST", at("/subjects/other%2Fname/versions"), schema(ROW)).await, (200, json!({ "id": 1 })));
    assert_eq!(ask("POST", orders.clone(), schema(WIDER)).await, (200, json!({ "id": 2 })));
    assert_eq!(ask("GET", at("/subjects"), json!(null)).await, (200, json!(["orders-value", "other/name"])));
    assert_eq!(ask("GET", orders.clone(), json!(null)).await, (200, json!([1, 2])));
    let first = json!({ "subject": "orders-value", "version": 1, "id": 1, "schema": ROW });
    assert_eq!(ask("GET", at("/subjects/orders-value/versions/1"), json!(null)).await, (200, first.clone()));
    assert_eq!(ask("POST", at("/subjects/orders-value"), schema(ROW)).await, (200, first));
    assert_eq!(ask("GET", at("/subjects/orders-value/versions/latest"), json!(null)).await.1["id"], 2);
    assert_eq!(ask("GET", at("/subjects/orders-value/versions/1/schema"), json!(null)).await.1["name"], "Value");
    assert_eq!(ask("GET", at("/schemas/ids/1"), json!(null)).await, (200, json!({ "schema": ROW })));
    let used = json!([{ "subject": "orders-value", "version": 1 }, { "subject": "other/name", "version": 1 }]);
    assert_eq!(ask("GET", at("/schemas/ids/1/versions"), json!(null)).await, (200, used));

    // Compatibility, and what may be asked about it.
    let code = |(status, body): (u16, Value)| (status, body["error_code"].as_u64().unwrap());
    assert_eq!(code(ask("POST", orders.clone(), schema(BREAKING)).await), (409, 409));
    let check = at("/compatibility/subjects/orders-value/versions/latest?verbose=true");
    let checked = ask("POST", check, schema(BREAKING)).await.1;
    assert_eq!(checked["is_compatible"], false);
    assert!(checked["messages"][0].as_str().unwrap().contains("must"), "{checked}");
    let config = at("/config/orders-value");
    assert_eq!(code(ask("GET", config.clone(), json!(null)).await), (404, 40408));
    assert_eq!(code(ask("PUT", config.clone(), json!({ "compatibility": "SIDEWAYS" })).await), (422, 42203));
    let none = json!({ "compatibility": "NONE" });
    assert_eq!(ask("PUT", config.clone(), none.clone()).await, (200, none));
    assert_eq!(ask("POST", orders.clone(), schema(BREAKING)).await, (200, json!({ "id": 3 })));
    assert_eq!(ask("DELETE", config, json!(null)).await, (200, json!({ "compatibilityLevel": "NONE" })));

    // What is not there, by Confluent's codes.
    assert_eq!(code(ask("GET", at("/subjects/nobody/versions"), json!(null)).await), (404, 40401));
    assert_eq!(code(ask("GET", at("/subjects/orders-value/versions/9"), json!(null)).await), (404, 40402));
    assert_eq!(code(ask("GET", at("/subjects/orders-value/versions/nine"), json!(null)).await), (422, 42202));
    assert_eq!(code(ask("GET", at("/schemas/ids/99"), json!(null)).await), (404, 40403));
    assert_eq!(code(ask("POST", at("/subjects/nobody"), schema(ROW)).await), (404, 40401));
    assert_eq!(code(ask("POST", at("/subjects/other%2Fname"), schema(WIDER)).await), (404, 40403));
    assert_eq!(code(ask("POST", orders.clone(), schema("{\"type\":\"recrd\"}")).await), (422, 42201));

    // Deleting: hidden first, then forgotten; the id stays known to those who have records with it.
    let subject = at("/subjects/orders-value");
    assert_eq!(code(ask("DELETE", format!("{subject}?permanent=true"), json!(null)).await), (404, 40405));
    assert_eq!(ask("DELETE", format!("{subject}/versions/3"), json!(null)).await, (200, json!(3)));
    assert_eq!(ask("GET", orders.clone(), json!(null)).await, (200, json!([1, 2])));
    assert_eq!(ask("DELETE", subject.clone(), json!(null)).await, (200, json!([1, 2])));
    assert_eq!(code(ask("GET", orders.clone(), json!(null)).await), (404, 40401));
    assert_eq!(ask("GET", format!("{orders}?deleted=true"), json!(null)).await, (200, json!([1, 2, 3])));
    assert_eq!(ask("POST", orders.clone(), schema(ROW)).await, (200, json!({ "id": 1 })));
    assert_eq!(ask("DELETE", subject.clone(), json!(null)).await, (200, json!([4])));
    assert_eq!(ask("DELETE", format!("{subject}?permanent=true"), json!(null)).await, (200, json!([1, 2, 3, 4])));
    assert_eq!(ask("GET", at("/schemas/ids/2"), json!(null)).await.0, 200);

    // All of it is on disk, and a second process reads it.
    drop(registry);
    let again = BuiltinRegistry::open_reader(folder.path()).unwrap();
    assert_eq!(&*again.schema(SchemaId(1)).await.unwrap(), ROW);
    assert_eq!(again.lookup("other/name", ROW).await.unwrap(), Some(SchemaId(1)));
    assert_eq!(again.lookup("orders-value", ROW).await.unwrap(), None);
    assert!(matches!(again.schema(SchemaId(77)).await, Err(RegistryError::UnknownId(77))));
}

/// What the contract promises, of any registry: `subject` is new in it.
async fn is_a_registry(registry: &dyn Registry, subject: &str) {
    assert_eq!(registry.lookup(subject, ROW).await.unwrap(), None);
    let id = registry.register(subject, ROW).await.unwrap();
    assert_eq!(registry.register(subject, ROW).await.unwrap(), id);
    assert_eq!(registry.lookup(subject, ROW).await.unwrap(), Some(id));
    let text = registry.schema(id).await.unwrap();
    let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    assert_eq!(json(&text), json(ROW));
    let wider = registry.register(subject, WIDER).await.unwrap();
    assert_ne!(wider, id);
    let missing = registry.schema(SchemaId(1_999_999_999)).await;
    assert!(matches!(missing, Err(RegistryError::UnknownId(1_999_999_999))), "{missing:?}");
    let invalid = registry.register(subject, "{\"type\":\"recrd\"}").await;
    assert!(matches!(invalid, Err(RegistryError::Rejected(_))), "{invalid:?}");
}

async fn set_backward(url: &str, subject: &str) {
    let body = json!({ "compatibility": "BACKWARD" }).to_string();
    let request = http().put(format!("{url}/config/{subject}")).header("content-type", "application/json").body(body);
    request.send().await.unwrap().error_for_status().unwrap();
}

#[tokio::test]
async fn the_client_works_with_the_built_in_registry_and_with_apicurio() {
    let folder = tempfile::tempdir().unwrap();
    let builtin = BuiltinRegistry::open(folder.path()).unwrap();
    is_a_registry(&builtin, "in-process-value").await;
    for url in [serve(&builtin).await, Apicurio::shared().await.url()] {
        let client = RegistryClient::new(&url, RegistryAuth::None).unwrap();
        is_a_registry(&client, "shop.public.orders-value").await;
        set_backward(&url, "shop.public.orders-value").await;
        let refused = client.register("shop.public.orders-value", BREAKING).await;
        assert!(matches!(refused, Err(RegistryError::Incompatible { .. })), "{url}: {refused:?}");
    }
}

#[tokio::test]
async fn a_registry_that_is_away_is_unavailable_and_one_of_several_is_enough() {
    let away = "http://127.0.0.1:1";
    let client = RegistryClient::new(away, RegistryAuth::None).unwrap();
    let error = client.register("s", ROW).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Unavailable(text) if text.contains("127.0.0.1:1")), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let builtin = BuiltinRegistry::open(folder.path()).unwrap();
    let both = format!("{away}, {}", serve(&builtin).await);
    RegistryClient::new(&both, RegistryAuth::None).unwrap().register("s", ROW).await.unwrap();
}

#[tokio::test]
async fn credentials_are_sent_and_never_shown() {
    let seen: Arc<std::sync::Mutex<Vec<String>>> = Arc::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let noted = seen.clone();
    let routes = axum::Router::new().fallback(async move |request: axum::extract::Request| {
        let header = request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned());
        noted.lock().unwrap().push(header.unwrap_or_default());
        axum::http::StatusCode::UNAUTHORIZED
    });
    tokio::spawn(async move { axum::serve(listener, routes).await });
    let client = RegistryClient::new(&format!("http://reader:p%40ss@{address}/base"), RegistryAuth::None).unwrap();
    let error = client.schema(SchemaId(1)).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Unavailable(text) if text.contains("username")), "{error}");
    assert!(!error.to_string().contains("p@ss") && !error.to_string().contains("p%40ss"), "{error}");
    // base64 of `reader:p@ss`; not sent again at once.
    assert_eq!(*seen.lock().unwrap(), ["Basic cmVhZGVyOnBAc3M="]);
}

/// What a proxy, a page to log in or a registry in maintenance says passes, or is mended where Tidegate does not see it;
/// what the registry says of the schema does not.
#[tokio::test(flavor = "multi_thread")]
async fn only_what_the_registry_says_of_a_schema_is_the_schemas_fault() {
    const PAGE: &str = "<html><body>Nothing to see here</body></html>";
    let passing = [
        (200, PAGE),
        (200, "{}"),
        (200, "[1, 2]"),
        (400, PAGE),
        (401, r#"{"error_code":401,"message":"Unauthorized"}"#),
        (401, PAGE),
        (403, r#"{"error_code":40301,"message":"User is denied operation Write"}"#),
        (404, PAGE),
        (404, ""),
        (404, r#"{"error":"no route"}"#),
        (405, PAGE),
        (408, ""),
        (422, r#"{"error_code":42205,"message":"Subject s is in read-only mode"}"#),
        (429, r#"{"error_code":42901,"message":"Too many requests"}"#),
        (500, r#"{"error_code":50003,"message":"Error while forwarding the request to the primary"}"#),
        (503, PAGE),
    ];
    // Answers by the number that the path begins with; 302 leads from a schema to a page.
    let server = Scripted::start(move |asked| {
        let number: usize = asked.path.split('/').nth(1).unwrap_or_default().parse().unwrap_or(usize::MAX);
        match passing.get(number) {
            Some((status, body)) => Told::status(*status).body(*body),
            None if asked.path.starts_with("/login") => Told::status(200).body(PAGE),
            None => Told::status(302).header("location", "/login"),
        }
    })
    .await;
    let asked = (0..=passing.len()).map(async |number| {
        let client = RegistryClient::new(&format!("http://{}/{number}", server.address), RegistryAuth::None).unwrap();
        let what = passing.get(number).map_or("302".to_owned(), |(status, body)| format!("{status} {body}"));
        let (registered, read, found) =
            tokio::join!(client.register("s", ROW), client.schema(SchemaId(7)), client.lookup("s", ROW));
        for error in [registered.err(), read.err(), found.err()] {
            let error = error.expect(&what);
            assert!(
                matches!(&error, RegistryError::Unavailable(text) if text.contains("127.0.0.1")),
                "{what}: {error}"
            );
        }
    });
    futures::future::join_all(asked).await;

    let lasting = [
        (404, r#"{"error_code":40403,"message":"Schema 7 not found"}"#, "UnknownId"),
        (
            422,
            r#"{"error_code":42201,"message":"Either the input schema or one its references is invalid"}"#,
            "Rejected",
        ),
        (409, r#"{"error_code":409,"message":"Schema being registered is incompatible"}"#, "Incompatible"),
    ];
    for (status, body, kind) in lasting {
        let server = Scripted::start(move |_| Told::status(status).body(body)).await;
        let client = RegistryClient::new(&format!("http://{}", server.address), RegistryAuth::None).unwrap();
        let error = match kind {
            "UnknownId" => client.schema(SchemaId(7)).await.unwrap_err(),
            _ => client.register("s", ROW).await.unwrap_err(),
        };
        assert!(format!("{error:?}").starts_with(kind), "{status} {body}: {error:?}");
        assert_eq!(server.asked().len(), 1, "it is not asked again");
    }
}

/// What a stock client prints of each record: key, value, headers.
const STOCK_CLIENT: &str = r#"
import json, sys
from confluent_kafka import Consumer
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer
from confluent_kafka.serialization import SerializationContext, MessageField
bootstrap, registry, topic, count = sys.argv[1:5]
decode = AvroDeserializer(SchemaRegistryClient({"url": registry}))
consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": topic, "auto.offset.reset": "earliest"})
consumer.subscribe([topic])
left = int(count)
while left:
    message = consumer.poll(30)
    assert message is not None and message.error() is None, message and message.error()
    key = decode(message.key(), SerializationContext(topic, MessageField.KEY))
    value = decode(message.value(), SerializationContext(topic, MessageField.VALUE))
    print(json.dumps({"key": key, "value": value, "headers": message.headers()}, default=str))
    left -= 1
consumer.close()
"#;

fn orders() -> Table {
    let column = |name: &str, kind: &str, nullable: bool, type_modifier: i32| Column {
        name: name.into(),
        column_type: ColumnType { oid: Oid(0), schema: "pg_catalog".into(), name: kind.into(), kind: TypeKind::Base },
        type_modifier,
        nullable,
        default_expression: None,
        generated: false,
    };
    Table {
        oid: Oid(1),
        schema: "public".into(),
        name: "orders".into(),
        replica_identity: ReplicaIdentity::Default,
        columns: vec![
            column("id", "int4", false, -1),
            column("note", "text", true, -1),
            // numeric(10,2)
            column("total", "numeric", false, ((10 << 16) | 2) + 4),
        ],
        key: vec![0],
    }
}

/// Writes an insert, a delete and its tombstone to a real Kafka and has the stock client read them.
#[cfg(feature = "kafka")]
async fn the_stock_client_reads(registry: Arc<dyn Registry>, url: &str) {
    use tidegate::log::{KafkaLog, KafkaSettings, Log, TopicSpec};
    let kafka = crate::support::Kafka::shared().await;
    let topic: Arc<str> = format!("shop{}.public.orders", uuid::Uuid::new_v4().simple()).into();
    let (table, encoding) = (orders(), EncodingSettings::new("shop", "shopdb"));
    let texts = schemas(&table, &encoding).unwrap();
    let key_id = registry.register(&format!("{topic}-key"), &texts.key.unwrap()).await.unwrap();
    let value_id = registry.register(&format!("{topic}-value"), &texts.value).await.unwrap();
    let plan = TablePlan::compile(&table, &encoding, Some(key_id.0), value_id.0).unwrap();
    let row = [Cell::Text(b"7"), Cell::Text("grüße".as_bytes()), Cell::Text(b"12.50")];
    let transaction = TransactionMeta::new(&encoding, 1_700_000_000_000_000, Some(42), Some(Lsn(9)), None);
    let meta = |operation| EventMeta {
        transaction: &transaction,
        operation,
        lsn: Lsn(11),
        snapshot: SnapshotMarker::False,
        block: None,
        processed_ns: 1_700_000_000_000_000_000,
    };
    let mut batch = RecordBatch::new();
    let slot = batch.topic_slot(&topic);
    let headers = batch.header_set([("origin", b"erp".as_slice())]);
    for (operation, before, after) in
        [(Operation::Create, None, Some(&row[..])), (Operation::Delete, Some(&row[..]), None)]
    {
        let mut record = batch.record(slot, &headers);
        record.key(|out| plan.write_key(&row, out)).unwrap();
        record.value(|out| plan.write_value(before, after, &meta(operation), out)).unwrap();
        record.finish();
    }
    let mut tombstone = batch.record(slot, &HeaderSet::default());
    tombstone.same_key_as_previous();
    tombstone.finish();

    let log = KafkaLog::open(KafkaSettings::new(&kafka.bootstrap())).await.unwrap();
    let spec =
        TopicSpec { name: topic.to_string(), partitions: 1, replication_factor: None, settings: Default::default() };
    log.ensure_topic(&spec).await.unwrap();
    let mut writer = log.writer(&topic).await.unwrap();
    writer.append(batch, None).await.unwrap().await.unwrap();

    let printed = crate::support::python(STOCK_CLIENT, &[&kafka.bootstrap(), url, &topic, "3"]).await;
    let read: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [insert, delete, tombstone] = &read[..] else { panic!("{printed}") };
    assert_eq!(insert["key"], json!({ "id": 7 }));
    assert_eq!(insert["value"]["after"], json!({ "id": 7, "note": "grüße", "total": "12.50" }));
    assert_eq!(insert["value"]["op"], "c");
    assert_eq!(insert["value"]["source"]["table"], "orders");
    assert_eq!(insert["headers"][0][0], "origin");
    assert_eq!((&delete["value"]["op"], &delete["value"]["after"]), (&json!("d"), &Value::Null));
    assert_eq!((&tombstone["key"], &tombstone["value"]), (&json!({ "id": 7 }), &Value::Null));
    log.close().await.unwrap();
}

#[cfg(feature = "kafka")]
#[tokio::test(flavor = "multi_thread")]
async fn a_stock_client_decodes_topics_by_the_built_in_registry() {
    let folder = tempfile::tempdir().unwrap();
    let registry = BuiltinRegistry::open(folder.path()).unwrap();
    let url = serve(&registry).await;
    the_stock_client_reads(Arc::new(registry), &url).await;
}

#[cfg(feature = "kafka")]
#[tokio::test(flavor = "multi_thread")]
async fn a_stock_client_decodes_topics_by_apicurio() {
    let url = Apicurio::shared().await.url();
    the_stock_client_reads(Arc::new(RegistryClient::new(&url, RegistryAuth::None).unwrap()), &url).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_hangs_and_comes_back_is_asked_again() {
    let apicurio = Apicurio::start().await;
    let client = RegistryClient::new(&apicurio.url(), RegistryAuth::None).unwrap();
    apicurio.freeze();
    let asking = tokio::spawn(async move { client.register("late-value", ROW).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!asking.is_finished());
    apicurio.thaw();
    eventually(Duration::from_secs(30), "an answer", async || asking.is_finished()).await;
    asking.await.unwrap().unwrap();
}
