//! What Tidegate keeps in the datastore, on a real PostgreSQL.

use serde_json::{Value, json};
use tidegate::datastore::*;
use tidegate::event::{Offset, Origin};
use tidegate::log::ConsumedRecord;

use crate::support::{Database, Postgres, Version};

async fn open(database: &Database<'_>) -> Datastore {
    let datastore = Datastore::open(&DatastoreSettings::from_url(&database.url()).unwrap()).unwrap();
    datastore.migrate().await.unwrap();
    datastore
}

const ROOM: Room = Room { records: 10, bytes: 1 << 20 };

fn key(id: i64) -> LinkKey {
    LinkKey { system: "erp".into(), object: "party".into(), key: json!({ "id": id }) }
}

fn record(offset: i64) -> ConsumedRecord {
    ConsumedRecord {
        topic: "shop.public.customers".into(),
        partition: 0,
        offset: Offset(offset),
        timestamp_ms: 0,
        key: Some(b"k".to_vec().into()),
        value: None,
        headers: vec![("h".into(), vec![0, 255].into())],
    }
}

#[tokio::test]
async fn several_workers_make_the_schema_at_once_and_a_role_without_rights_is_told_the_sql() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("migrate").await;
    let settings = DatastoreSettings::from_url(&database.url()).unwrap();
    let datastore = Datastore::open(&settings).unwrap();
    let all = futures::future::join_all((0..8).map(|_| datastore.migrate())).await;
    assert!(all.iter().all(Result::is_ok), "{all:?}");

    let other = server.database("poor").await;
    other
        .connect_as_superuser()
        .await
        .batch_execute(&format!(
            "ALTER DATABASE {} OWNER TO postgres; REVOKE CREATE ON DATABASE {0} FROM PUBLIC",
            other.name
        ))
        .await
        .unwrap();
    let poor = Datastore::open(&DatastoreSettings::from_url(&other.url()).unwrap()).unwrap();
    let error = poor.migrate().await.unwrap_err();
    assert_eq!(error.kind, DatastoreErrorKind::Setup);
    assert!(error.message.contains("CREATE SCHEMA IF NOT EXISTS tidegate"), "{error}");
    // What the DBA is told is enough.
    let missing = poor.missing().await.unwrap().unwrap();
    other.connect_as_superuser().await.batch_execute(&missing.sql.join("\n")).await.unwrap();
    poor.migrate().await.unwrap();
    assert!(poor.missing().await.unwrap().is_none());
}

#[tokio::test]
async fn a_link_is_locked_before_it_exists_and_is_unique_both_ways() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("links").await;
    let datastore = open(&database).await;
    let (mut one, mut two) = (datastore.client().await.unwrap(), datastore.client().await.unwrap());
    let first = one.transaction().await.unwrap();
    assert_eq!(lock_link(&first, &key(1)).await.unwrap(), None);
    let waiting = async {
        let second = two.transaction().await.unwrap();
        let link = lock_link(&second, &key(1)).await.unwrap();
        second.commit().await.unwrap();
        link
    };
    let mut link = Link::new(key(1), "public.customers");
    link.external = Some(json!(7));
    link.kept = json!({"address": 3}).as_object().unwrap().clone();
    link.base_doc = Some(json!({"key": {"id": 1}, "after": {"z": "9.90", "a": 1}}));
    let writing = async {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        save_link(&first, &link).await.unwrap();
        first.commit().await.unwrap();
    };
    let (seen, ()) = tokio::join!(waiting, writing);
    let seen = seen.expect("the second waits for the first and sees what it wrote");
    assert_eq!((seen.external.clone(), seen.base_doc.clone()), (Some(json!(7)), link.base_doc.clone()));
    assert_eq!(seen.shown(), Some(json!({"id": 7, "address": 3})));

    let client = datastore.client().await.unwrap();
    let by_scalar = LinkKey { key: json!(1), ..key(1) };
    assert!(find_link(&client, &by_scalar).await.unwrap().is_some());
    assert!(link_by_external(&client, "erp", "party", &json!("7"), false).await.unwrap().is_some());
    let mut double = Link::new(key(2), "public.customers");
    double.external = Some(json!(7));
    assert_eq!(save_link(&client, &double).await.unwrap_err().kind, DatastoreErrorKind::Conflict);

    assert!(rekey_link(&client, &key(1), &json!({"id": 9})).await.unwrap());
    assert!(!rekey_link(&client, &key(1), &json!({"id": 9})).await.unwrap(), "the second event finds it done");
    assert!(find_link(&client, &key(9)).await.unwrap().is_some());

    let before = push_seq_now(&client).await.unwrap();
    assert_eq!((before, next_push_seq(&client).await.unwrap()), (0, 1));
    assert_eq!(push_seq_now(&client).await.unwrap(), 1);

    save_lines(&client, &key(9), &[("public.lines".into(), json!({"id": 5}))]).await.unwrap();
    let root = root_of_line(&client, "erp", "party", "public.lines", &json!({"id": 5})).await.unwrap();
    assert_eq!(root, Some(json!({"id": 9})));
    delete_link(&client, &key(9)).await.unwrap();
}

#[tokio::test]
async fn a_numeric_key_is_asked_for_by_value_however_it_is_spelled() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("spelled").await;
    let datastore = open(&database).await;
    let client = datastore.client().await.unwrap();
    let spelled = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    let key = |text: &str| LinkKey { key: spelled(text), ..key(0) };
    for (id, text) in
        [(1, r#"{"id": 7.00}"#), (2, r#"{"id": 100}"#), (3, r#"{"id": "7.00"}"#), (4, r#"{"a": 7, "b": 7}"#)]
    {
        let mut link = Link::new(key(text), "public.customers");
        link.external = Some(json!(id));
        save_link(&client, &link).await.unwrap();
    }
    for (asked, found) in [
        ("7", Some(1)),
        ("7.0", Some(1)),
        ("7.000", Some(1)),
        (r#"{"id": 7.0}"#, Some(1)),
        ("100.0", Some(2)),
        ("1e2", Some(2)),
        ("10", None),
        ("7.001", None),
        (r#""7.00""#, Some(3)),
        (r#"{"a": 7.0, "b": 7}"#, Some(4)),
    ] {
        let link = find_link(&client, &key(asked)).await.unwrap();
        assert_eq!(link.and_then(|link| link.external), found.map(|id| json!(id)), "{asked}");
    }
    // So is one that is waited for.
    let waits_for = Some(("erp".to_owned(), "party".to_owned(), spelled("7.0")));
    let waiting =
        NewParked { waits_for, deadline_s: Some(60.0), ..NewParked::new(ParkedKind::Waiting, "no party yet") };
    park(&client, "orders", &json!({"id": 1}), &record(0), &waiting).await.unwrap();
    assert_eq!(parked_ready(&client, "orders", &Owned::all(), ROOM).await.unwrap().len(), 1);
}

#[tokio::test]
async fn parked_records_keep_their_order_and_wake_when_the_link_is_there() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("parked").await;
    let datastore = open(&database).await;
    let client = datastore.client().await.unwrap();
    let sale = json!({"id": 100});
    let why = |kind, waits_for| NewParked {
        kind,
        waits_for,
        reason: "no party yet".into(),
        request: None,
        response: Some(json!({"status": 400})),
        deadline_s: Some(3600.0),
        heals: false,
        retry_s: None,
    };
    let waits = Some(("erp".to_owned(), "party".to_owned(), json!(1)));
    park(&client, "orders", &sale, &record(0), &why(ParkedKind::Waiting, waits)).await.unwrap();
    park(&client, "orders", &sale, &record(1), &why(ParkedKind::Behind, None)).await.unwrap();
    assert!(!park_behind(&client, "orders", &sale, &record(0)).await.unwrap(), "it keeps its place and its reason");
    assert!(park_behind(&client, "orders", &sale, &record(2)).await.unwrap());
    let queue = parked_queue(&client, "orders", &sale, false, ROOM).await.unwrap();
    assert_eq!(
        queue.iter().map(|one| (one.record.offset.0, one.summary.kind)).collect::<Vec<_>>(),
        [(0, ParkedKind::Waiting), (1, ParkedKind::Behind), (2, ParkedKind::Behind)]
    );
    unpark(&client, "orders", &sale, &record(2)).await.unwrap();
    assert!(has_queue(&client, "orders", &sale).await.unwrap());
    assert!(!has_queue(&client, "orders", &json!({"id": 2})).await.unwrap());
    assert!(parked_ready(&client, "orders", &Owned::all(), ROOM).await.unwrap().is_empty());

    let mut link = Link::new(key(1), "public.customers");
    link.external = Some(json!(7));
    save_link(&client, &link).await.unwrap();
    let ready = parked_ready(&client, "orders", &Owned::all(), ROOM).await.unwrap();
    assert_eq!(ready.len(), 1, "only the first of the queue");
    assert!(ready[0].satisfied);
    assert_eq!(ready[0].record, record(0));
    assert_eq!(parked_queue(&client, "orders", &sale, false, ROOM).await.unwrap().len(), 2);
    unpark(&client, "orders", &sale, &record(0)).await.unwrap();
    let ready = parked_ready(&client, "orders", &Owned::all(), ROOM).await.unwrap();
    assert_eq!(ready[0].record.offset, Offset(1), "the next one moves up");

    park(&client, "orders", &sale, &record(1), &why(ParkedKind::Rejected, None)).await.unwrap();
    assert!(parked_ready(&client, "orders", &Owned::all(), ROOM).await.unwrap().is_empty());
    assert_eq!(command_parked(&client, "orders", None, Command::Replay).await.unwrap(), 1);
    assert_eq!(
        parked_ready(&client, "orders", &Owned::all(), ROOM).await.unwrap()[0].summary.command,
        Some(Command::Replay)
    );
    assert_eq!(list_parked(&client, None, 10).await.unwrap()[0].attempts, 2);
    assert_eq!(parked_counts(&client, Some("orders")).await.unwrap(), vec![("orders".into(), ParkedKind::Rejected, 1)]);
    assert!(show_parked(&client, "orders", "shop.public.customers", 0, 1).await.unwrap().is_some());
}

#[tokio::test]
async fn what_is_parked_is_taken_up_as_far_as_there_is_room_and_shown_in_short() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("room").await;
    let datastore = open(&database).await;
    let client = datastore.client().await.unwrap();
    let big = |offset| ConsumedRecord { value: Some(vec![7; 1000].into()), ..record(offset) };
    for offset in 0..4 {
        park_behind(&client, "orders", &json!({ "id": offset }), &big(offset)).await.unwrap();
        park_behind(&client, "orders", &json!({"id": 9}), &big(10 + offset)).await.unwrap();
    }
    let offsets = |parked: Vec<Parked>| parked.iter().map(|one| one.record.offset.0).collect::<Vec<_>>();
    for (records, bytes, heads, queue) in [
        (10, 1 << 20, vec![0, 10, 1, 2, 3], vec![10, 11, 12, 13]),
        (2, 1 << 20, vec![0, 10], vec![10, 11]),
        (10, 2500, vec![0, 10, 1], vec![10, 11, 12]),
        (10, 1, vec![0], vec![10]),
    ] {
        let room = Room { records, bytes };
        let ready = parked_ready(&client, "orders", &Owned::all(), room).await.unwrap();
        assert!(ready.iter().all(|one| one.record.value.as_ref().is_some_and(|value| value.len() == 1000)));
        assert_eq!(offsets(ready), heads, "{room:?}");
        let found = parked_queue(&client, "orders", &json!({"id": 9}), false, room).await.unwrap();
        assert_eq!(offsets(found), queue, "{room:?}");
    }
    // A system may answer with anything.
    let long = "ä".repeat(1 << 20);
    let response = Some(json!({"status": 400, "body": [long]}));
    let rejected = NewParked { response, ..NewParked::new(ParkedKind::Rejected, "no") };
    park(&client, "orders", &json!({"id": 1}), &record(1), &rejected).await.unwrap();
    let shown = show_parked(&client, "orders", "shop.public.customers", 0, 1).await.unwrap().unwrap();
    let shown = shown.summary.response.unwrap();
    let body = shown["body"].as_str().unwrap();
    assert!(shown["status"] == 400 && body.starts_with("[\"ää"), "{shown}");
    assert!(body.len() < 40_000 && body.ends_with("… (2097156 bytes in all)"), "{}", &body[body.len() - 60..]);
}

#[tokio::test]
async fn a_cursor_and_a_lease_only_move_for_their_holder() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("cursors").await;
    let datastore = open(&database).await;
    let mut client = datastore.client().await.unwrap();
    let none = load_cursor(&client, "c").await.unwrap();
    assert_eq!((none.generation, none.cursor), (0, Value::Null));
    let first = save_cursor(&client, "c", &json!("a"), 0).await.unwrap();
    let error = save_cursor(&client, "c", &json!("b"), 0).await.unwrap_err();
    assert_eq!(error.kind, DatastoreErrorKind::Lost);
    save_cursor(&client, "c", &json!("b"), first.generation).await.unwrap();
    assert_eq!(load_cursor(&client, "c").await.unwrap().cursor, json!("b"));

    let time = std::time::Duration::from_millis(300);
    let mine = acquire_lease(&client, "l", "me", time).await.unwrap().unwrap();
    assert_eq!(acquire_lease(&client, "l", "you", time).await.unwrap(), None);
    assert!(lease_owner_alive(&client, "me").await.unwrap());
    tokio::time::sleep(time + time).await;
    assert!(!lease_owner_alive(&client, "me").await.unwrap());
    let yours = acquire_lease(&client, "l", "you", time).await.unwrap().unwrap();
    assert!(yours.generation > mine.generation);
    assert!(renew_leases(&client, "me", time).await.unwrap().is_empty());
    release_leases(&client, "you", &["l".into()]).await.unwrap();

    let (id, cursor) = (json!(5), json!("2026-01-01T00:00:00Z"));
    for record in [json!({"n": 1}), json!({"n": 2})] {
        let waiting = Hold {
            system: "erp",
            object: "party",
            id: &id,
            record: &record,
            reason: "pending",
            push_seq: 3,
            cursor: &cursor,
            behind: false,
            retry_s: 0.0,
        };
        hold(&client, "c", &waiting).await.unwrap();
    }
    let due = held(&client, "c", true, 10).await.unwrap();
    assert_eq!((due.len(), &due[0].record, due[0].attempts), (1, &json!({"n": 2}), 2));
    drop_held(&client, "c", "party", &json!(5)).await.unwrap();

    let transaction = client.transaction().await.unwrap();
    tag(&transaction, &Origin { system: "erp".into(), connector: "c".into() }).await.unwrap();
    transaction.commit().await.unwrap();
}

#[tokio::test]
async fn rows_and_documents_are_read_in_the_form_of_events() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("rows").await;
    database
        .execute(
            "CREATE TABLE orders (id int PRIMARY KEY, number text, placed_at timestamptz, total numeric(10,2), day timestamp);
             CREATE TABLE lines (id int PRIMARY KEY, order_id int, price numeric(10,2), at timestamptz);
             INSERT INTO orders VALUES (1, 'A', '2026-01-02 03:04:05.5+01', 9.90, '2026-01-02 03:04:05');
             INSERT INTO lines VALUES (11, 1, 1.10, '2026-01-02 03:04:05Z'), (10, 1, 2.20, NULL), (12, 2, 1, NULL)",
        )
        .await;
    let datastore = open(&database).await;
    let client = datastore.client().await.unwrap();
    let orders: TableName = "orders".parse().unwrap();
    let row = read_row(&client, &orders, &json!({"id": 1})).await.unwrap().unwrap();
    let text = r#"{"id":1,"number":"A","placed_at":"2026-01-02T02:04:05.5Z","total":9.90,"day":"2026-01-02T03:04:05"}"#;
    assert_eq!(row.to_string(), text);
    assert_eq!(read_row(&client, &orders, &json!({"id": 2})).await.unwrap(), None);
    assert_eq!(primary_key(&client, &orders).await.unwrap(), ["id"]);

    let lines = Lines {
        name: "lines".into(),
        table: "lines".parse().unwrap(),
        column: "order_id".into(),
        order: vec!["id".into()],
    };
    let document = read_document(&client, &orders, &json!({"id": 1}), &[lines]).await.unwrap().unwrap();
    assert_eq!(document["key"], json!({"id": 1}));
    assert_eq!(
        document["lines"].to_string(),
        r#"[{"id":10,"order_id":1,"price":2.20,"at":null},{"id":11,"order_id":1,"price":1.10,"at":"2026-01-02T03:04:05Z"}]"#
    );

    let query = "SELECT number, (SELECT count(*) FROM lines l WHERE l.order_id = o.id) AS n FROM orders o WHERE id = ($1->>'id')::int;";
    let document = query_document(&client, query, &json!({"id": 1})).await.unwrap().unwrap();
    assert_eq!(document.to_string(), r#"{"key":{"id":1},"after":{"number":"A","n":2},"number":"A","n":2}"#);

    let normal = normalize_rows(&client, &orders, &[json!({"total": "9.9", "id": "1"})]).await.unwrap().remove(0);
    assert_eq!(normal.to_string(), r#"{"id":1,"total":9.90}"#);
}
