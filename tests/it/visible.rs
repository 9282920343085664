//! An event can be there before its transaction can be seen: the row is read when it can.

use std::time::Duration;

use crate::support::office::Office;
use crate::support::{Postgres, Version, WorkerLog, eventually};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_that_are_captured_before_others_can_see_them_are_delivered_when_they_can() {
    for version in Version::ALL {
        let server: &'static Postgres = Box::leak(Box::new(Postgres::own(version).await));
        let office = Office::on(server, "unseen", WorkerLog::Embedded, "").await;
        office.deliver("delete: { request: 'PUT /customers/{{ $link.id }}', map: '{ name: \"gone\" }' }");
        let admin = office.database.connect_as_superuser().await;
        // Only the commits of the test itself wait for a standby.
        admin.batch_execute("ALTER ROLE tidegate SET synchronous_commit = local").await.unwrap();
        let _worker = office.workshop.start().await;
        office.until_delivered(&["Ada", "Grace"]).await;
        admin.batch_execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'").await.unwrap();
        admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        let standby = "SELECT setting FROM pg_settings WHERE name = 'synchronous_standby_names'";
        eventually(Duration::from_secs(30), "a standby is waited for", async || {
            let client = office.database.connect_as_superuser().await;
            client.query_one(standby, &[]).await.unwrap().get::<_, String>(0) == "nobody"
        })
        .await;
        let writer = office.database.connect_as_superuser().await;
        let commit = tokio::spawn(async move {
            let sql = "BEGIN; UPDATE customers SET name = 'Eve' WHERE id = 1; DELETE FROM customers WHERE id = 2; \
                       INSERT INTO customers VALUES (3, 'Cid'); COMMIT";
            writer.batch_execute(sql).await
        });
        let seen = eventually(Duration::from_secs(60), "the sink says what it waits for", async || {
            let status = office.workshop.connector_status(&office.sink).await.to_string();
            if status.contains("can't be seen yet") {
                Ok(status)
            } else {
                Err(format!("{status} {:?}", office.crm.names()))
            }
        })
        .await;
        assert!(seen.contains("synchronous standby"), "{seen}");
        assert!(!commit.is_finished(), "the commit waits");
        assert_eq!(office.crm.names(), ["Ada", "Grace"]);
        admin.batch_execute("ALTER SYSTEM RESET synchronous_standby_names").await.unwrap();
        admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        commit.await.unwrap().unwrap();
        office.until_delivered(&["Cid", "Eve", "gone"]).await;
    }
}
