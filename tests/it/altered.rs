//! Tables that are altered while a sink and a pull work on them, and a datastore that is not set up for a while: both go
//! on by themselves, and nothing is set aside for it.

use std::time::Duration;

use serde_json::json;
use tidegate::datastore::{Datastore, DatastoreSettings};
use tidegate::pipeline::ConnectorState;

use crate::delivery::settled;
use crate::pull::{PARTS, pull};
use crate::references::{behind_proxy, item, items};
use crate::support::shop::Shop;
use crate::support::{Api, Postgres, Stage, Version, eventually};

const LONG: Duration = Duration::from_secs(90);

#[tokio::test]
async fn a_sink_goes_on_while_its_table_is_altered() {
    let (api, proxy, system) = behind_proxy("").await;
    let shop = Shop::start("altered").await;
    let sink = shop.sink("parts", &system, &items("{ name: .after.name, weight: .after.weight, city: .after.city }"));
    shop.sql("INSERT INTO customers (id, name, city) VALUES (1, 'a', '7'), (2, 'b', '8')").await;
    settled(&shop, "parts").await;
    // Each in its own transaction, while rows change.
    let alters = [
        "ALTER TABLE customers ADD COLUMN weight int DEFAULT 3",
        "ALTER TABLE customers ALTER COLUMN city TYPE int USING city::int",
        "ALTER TABLE customers DROP COLUMN street",
        "ALTER TABLE customers ALTER COLUMN weight TYPE numeric(6,2)",
        "ALTER TABLE customers RENAME TO clients; ALTER TABLE clients RENAME TO customers",
        "CREATE TABLE public.other (LIKE customers INCLUDING ALL); INSERT INTO public.other SELECT * FROM customers; \
         ALTER TABLE customers RENAME TO old; ALTER TABLE other RENAME TO customers; \
         CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON customers FOR EACH ROW EXECUTE FUNCTION capture.note(); \
         DROP TABLE old",
    ];
    for (number, alter) in (10..).zip(alters) {
        shop.sql(alter).await;
        shop.sql(&format!("UPDATE customers SET name = 'a{number}' WHERE id = 1")).await;
        shop.sql(&format!("INSERT INTO customers (id, name) VALUES ({number}, 'n{number}')")).await;
        let made = format!("n{number}");
        eventually(LONG, alter, async || {
            if item(&api, &made).is_null() { Err(format!("{:?}", sink.status.last_error())) } else { Ok(()) }
        })
        .await;
        settled(&shop, "parts").await;
        assert!(shop.parked().await.is_empty(), "{alter}: {:?}", shop.parked().await);
        assert!(!item(&api, &format!("a{number}")).is_null() && !item(&api, &format!("n{number}")).is_null());
    }
    // The table is away for a while: its rows wait, and nothing is set aside.
    shop.sql("UPDATE customers SET name = 'late' WHERE id = 2; ALTER TABLE customers RENAME TO clients").await;
    eventually(LONG, "it waits", async || {
        let told = sink.status.last_error().map(|(_, told)| told).unwrap_or_default();
        if told.contains("customers") && sink.status.state() == ConnectorState::Waiting { Ok(()) } else { Err(told) }
    })
    .await;
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    shop.sql("ALTER TABLE clients RENAME TO customers").await;
    settled(&shop, "parts").await;
    assert_eq!((item(&api, "late")["city"].clone(), shop.parked().await.len()), (json!(8), 0));
    assert_eq!(proxy.count("POST", "/items"), api.items().len());
    eventually(LONG, "it runs", async || sink.status.state() == ConnectorState::Running).await;
    sink.stop().await;
}

#[tokio::test]
async fn a_pull_goes_on_while_its_table_is_altered() {
    let database = Postgres::shared(Version::Distribution).await.database("pull_altered").await;
    database.execute(PARTS).await;
    let client = database.connect().await;
    let part = |id: i64, name: &str| json!({"id": id, "sku": format!("S{id}"), "name": name, "price": "9.90"});
    let api = Api::start(vec![part(1, "a"), part(2, "b")]).await;
    let settings = format!("base_url: {}\nbreaker: {{ failures: 3, open: 200ms }}", api.url());
    let stage = Stage::new(&database, &[("api", &settings)]).await;
    let running = stage.start(&pull("/all", ""));
    let is = async |name: &str| -> Result<(), String> {
        let row = client
            .query_one(
                "SELECT (SELECT string_agg(name, ' ' ORDER BY sku) FROM parts), (SELECT count(*) FROM tidegate.parked)",
                &[],
            )
            .await
            .map_err(|error| error.to_string())?;
        let (names, parked): (Option<String>, i64) = (row.get(0), row.get(1));
        assert_eq!(parked, 0, "nothing is parked: {:?}", running.status.last_error());
        let names = names.unwrap_or_default();
        if names == name { Ok(()) } else { Err(format!("{names} {:?}", running.status.last_error())) }
    };
    eventually(LONG, "both are there", async || is("a b").await).await;
    for (at, alter) in [
        "ALTER TABLE parts ADD COLUMN weight int DEFAULT 3",
        "ALTER TABLE parts ALTER COLUMN price TYPE text",
        "ALTER TABLE parts ALTER COLUMN name TYPE varchar(40)",
        "ALTER TABLE parts DROP COLUMN note",
        "ALTER TABLE parts RENAME TO pieces; ALTER TABLE pieces RENAME TO parts",
    ]
    .into_iter()
    .enumerate()
    {
        // The check of the price goes by numbers.
        client.batch_execute("ALTER TABLE parts DROP CONSTRAINT IF EXISTS parts_price_check").await.unwrap();
        client.batch_execute(alter).await.unwrap();
        let name = format!("n{at}");
        api.set(vec![part(1, &name), part(2, "b")]);
        eventually(LONG, alter, async || is(&format!("{name} b")).await).await;
    }
    // Table or column are away for a while: the records wait, and none is taken for applied.
    for (at, (away, back)) in [
        ("ALTER TABLE parts RENAME TO pieces", "ALTER TABLE pieces RENAME TO parts"),
        ("ALTER TABLE parts RENAME COLUMN name TO title", "ALTER TABLE parts RENAME COLUMN title TO name"),
    ]
    .into_iter()
    .enumerate()
    {
        client.batch_execute(away).await.unwrap();
        let name = format!("late{at}");
        api.set(vec![part(1, &name), part(2, "b")]);
        // More than once: it has looked at the table anew by then.
        eventually(LONG, "it waits", async || {
            let told = running.status.last_error().map(|(_, told)| told).unwrap_or_default();
            let waits = running.state() == ConnectorState::Waiting;
            if waits && (told.contains("does not exist") || told.contains("no column")) { Ok(()) } else { Err(told) }
        })
        .await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        client.batch_execute(back).await.unwrap();
        eventually(LONG, away, async || is(&format!("{name} b")).await).await;
    }
    eventually(LONG, "it runs", async || running.state() == ConnectorState::Running).await;
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_datastore_that_only_reads_or_lets_nobody_in_is_waited_for() {
    let (api, _proxy, system) = behind_proxy("").await;
    let mut shop = Shop::start("standby").await;
    let role = format!("keeper_{}", shop.database.name);
    let superuser = shop.database.connect_as_superuser().await;
    superuser
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'one' IN ROLE tidegate; ALTER ROLE {role} SET ROLE tidegate"
        ))
        .await
        .unwrap();
    let url = shop.database.url().replace("tidegate:tidegate@", &format!("{role}:one@"));
    let direct =
        std::mem::replace(&mut shop.datastore, Datastore::open(&DatastoreSettings::from_url(&url).unwrap()).unwrap());
    let sink = shop.sink("parts", &system, &items("{ name: .after.name }"));
    shop.sql("INSERT INTO customers (id, name) VALUES (0, 'first')").await;
    eventually(LONG, "made", async || !item(&api, "first").is_null()).await;
    let cut = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'");
    for (at, (away, back, said)) in [
        // As a standby is, or a server with a full disk; new sessions are, or the ones that are there become so.
        (
            "ALTER ROLE @ SET default_transaction_read_only = on; CUT",
            "ALTER ROLE @ RESET default_transaction_read_only",
            "allow writes",
        ),
        ("ALTER ROLE @ PASSWORD 'two'; CUT", "ALTER ROLE @ PASSWORD 'one'", "28P01"),
        ("ALTER ROLE @ NOLOGIN; CUT", "ALTER ROLE @ LOGIN", "28000"),
        ("ALTER ROLE @ CONNECTION LIMIT 0; CUT", "ALTER ROLE @ CONNECTION LIMIT -1", "53300"),
        ("REVOKE ALL ON tidegate.links FROM tidegate", "GRANT ALL ON tidegate.links TO tidegate", "42501"),
        ("ALTER TABLE tidegate.links RENAME TO hidden", "ALTER TABLE tidegate.hidden RENAME TO links", "42P01"),
    ]
    .into_iter()
    .enumerate()
    {
        let sql = |text: &str| text.replace('@', &role).replace("CUT", &cut);
        superuser.batch_execute(&sql(away)).await.unwrap();
        shop.sql(&format!("INSERT INTO customers (id, name) VALUES ({at} + 1, 'n{at}')")).await;
        eventually(LONG, said, async || {
            let told = sink.status.last_error().map(|(_, told)| told).unwrap_or_default();
            if told.contains(said) && sink.status.state() == ConnectorState::Waiting { Ok(()) } else { Err(told) }
        })
        .await;
        superuser.batch_execute(&sql(back)).await.unwrap();
        eventually(LONG, said, async || !item(&api, &format!("n{at}")).is_null()).await;
        eventually(LONG, "it runs", async || sink.status.state() == ConnectorState::Running).await;
    }
    shop.datastore = direct;
    settled(&shop, "parts").await;
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    sink.stop().await;
}

#[tokio::test]
async fn a_pull_takes_its_lease_anew_that_the_datastore_has_lost() {
    let database = Postgres::shared(Version::Distribution).await.database("lease_lost").await;
    database.execute(PARTS).await;
    let client = database.connect().await;
    let part = |name: &str| vec![json!({"id": 1, "sku": "S1", "name": name, "price": "9.90"})];
    let api = Api::start(part("a")).await;
    let stage = Stage::new(&database, &[("api", &format!("base_url: {}", api.url()))]).await;
    let running = stage.start(&pull("/all", ""));
    let is = async |name: &str| {
        let row = client.query_opt("SELECT name FROM parts", &[]).await.unwrap();
        let seen = row.map(|row| row.get::<_, String>(0)).unwrap_or_default();
        if seen == name { Ok(()) } else { Err(format!("{seen} {:?}", running.status.last_error())) }
    };
    eventually(LONG, "it is there", async || is("a").await).await;
    // As a backup has it from before the start, or from before that of another worker.
    for (lost, name) in [
        ("DELETE FROM tidegate.leases", "b"),
        ("UPDATE tidegate.leases SET generation = generation - 1, owner = 'parts:before'", "c"),
    ] {
        client.batch_execute(lost).await.unwrap();
        api.set(part(name));
        eventually(LONG, lost, async || is(name).await).await;
    }
    // One that another took since is the other's.
    client
        .batch_execute("UPDATE tidegate.leases SET generation = generation + 1, owner = 'parts:other'")
        .await
        .unwrap();
    api.set(part("d"));
    assert!(running.fails().await.contains("another worker has taken over"));
}
