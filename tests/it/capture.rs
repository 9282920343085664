//! Capture on real servers: what was committed is in the topics, whole, in order, whatever happens in between.

use serde_json::json;

use crate::support::capture::World;
use crate::support::{Postgres, Version};

fn letters(changes: &[tidegate::event::Change]) -> String {
    changes.iter().map(|change| change.operation.letter()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_from_before_and_changes_from_after_are_in_the_topic() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("basic").await;
        database
            .execute(
                "CREATE TABLE orders (id int PRIMARY KEY, what text, amount numeric(10,2)); \
                 INSERT INTO orders VALUES (1, 'before', 1.50), (2, E'tab\\there', NULL)",
            )
            .await;
        let world = World::new(&database, &[r"public\.orders"]);
        let capture = world.start().await;
        world.wait_for_changes("shop.public.orders", 2).await;
        database
            .execute(
                "INSERT INTO orders VALUES (3, 'after', 3); UPDATE orders SET amount = 4 WHERE id = 1; \
                 DELETE FROM orders WHERE id = 2; UPDATE orders SET id = 30 WHERE id = 3",
            )
            .await;
        let changes = world.wait_for_changes("shop.public.orders", 7).await;
        assert_eq!(letters(&changes), "rrcuddc");
        assert_eq!(changes[1].after, json!({"id": 2, "what": "tab\there", "amount": null}));
        assert_eq!(changes[5].new_key, Some(json!({"id": 30})));
        assert_eq!(changes[6].old_key, Some(json!({"id": 3})));
        let folded = world.folded("shop.public.orders").await;
        assert_eq!(folded.keys().collect::<Vec<_>>(), [r#"{"id":1}"#, r#"{"id":30}"#]);
        let tombstones = world.records("shop.public.orders").await.iter().filter(|r| r.value.is_none()).count();
        assert_eq!(tombstones, 2);
        capture.stop().await.unwrap();
    }
}
