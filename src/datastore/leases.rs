//! Leases: who may do what only one worker may (CORRECTNESS 25). Times are the server's, so that workers' clocks
//! don't matter; every change of owner raises the generation.

use std::time::Duration;

use deadpool_postgres::GenericClient;

use super::DatastoreError;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub name: String,
    pub owner: String,
    pub generation: i64,
}

/// Takes the lease where it is free, lapsed or the owner's own; `None` while another has it.
pub async fn acquire_lease<C: GenericClient>(
    client: &C,
    name: &str,
    owner: &str,
    time: Duration,
) -> Result<Option<Lease>, DatastoreError> {
    let row = client
        .query_opt(
            "INSERT INTO tidegate.leases AS l (name, owner, expires_at) \
             VALUES ($1, $2, now() + make_interval(secs => $3::float8)) \
             ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, expires_at = excluded.expires_at, \
                generation = l.generation + (l.owner <> excluded.owner)::int \
             WHERE l.owner = excluded.owner OR l.expires_at < now() RETURNING generation",
            &[&name, &owner, &time.as_secs_f64()],
        )
        .await?;
    Ok(row.map(|row| Lease { name: name.to_owned(), owner: owner.to_owned(), generation: row.get(0) }))
}

/// Takes the lease, whoever has it.
pub async fn seize_lease<C: GenericClient>(
    client: &C,
    name: &str,
    owner: &str,
    time: Duration,
) -> Result<Lease, DatastoreError> {
    let row = client
        .query_one(
            "INSERT INTO tidegate.leases AS l (name, owner, expires_at) \
             VALUES ($1, $2, now() + make_interval(secs => $3::float8)) \
             ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, expires_at = excluded.expires_at, \
                generation = l.generation + 1 RETURNING generation",
            &[&name, &owner, &time.as_secs_f64()],
        )
        .await?;
    Ok(Lease { name: name.to_owned(), owner: owner.to_owned(), generation: row.get(0) })
}

/// True while the lease is its owner's; nobody else can take it before the transaction ends.
pub async fn holds_lease<C: GenericClient>(transaction: &C, lease: &Lease) -> Result<bool, DatastoreError> {
    let select = transaction
        .prepare_cached("SELECT FROM tidegate.leases WHERE name = $1 AND owner = $2 AND generation = $3 FOR SHARE")
        .await?;
    let found = transaction.query_opt(&select, &[&lease.name, &lease.owner, &lease.generation]).await?;
    Ok(found.is_some())
}

/// Whether another has the lease by now. Not so of one that is gone, or of an earlier generation: the datastore has lost
/// what it had, since it was restored, or a standby without the last transactions took its place.
pub async fn is_anothers_lease<C: GenericClient>(client: &C, lease: &Lease) -> Result<bool, DatastoreError> {
    let select = "SELECT EXISTS (SELECT FROM tidegate.leases WHERE name = $1 AND owner <> $2 AND generation >= $3)";
    Ok(client.query_one(select, &[&lease.name, &lease.owner, &lease.generation]).await?.get(0))
}

/// Prolongs all of the owner's leases; returns the names of those it still has.
pub async fn renew_leases<C: GenericClient>(
    client: &C,
    owner: &str,
    time: Duration,
) -> Result<Vec<String>, DatastoreError> {
    let rows = client
        .query(
            "UPDATE tidegate.leases SET expires_at = now() + make_interval(secs => $2::float8) \
             WHERE owner = $1 RETURNING name",
            &[&owner, &time.as_secs_f64()],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Gives leases back: all of the owner's whose names are in `names`.
pub async fn release_leases<C: GenericClient>(client: &C, owner: &str, names: &[String]) -> Result<(), DatastoreError> {
    client.execute("DELETE FROM tidegate.leases WHERE owner = $1 AND name = ANY($2)", &[&owner, &names]).await?;
    Ok(())
}

/// True while the owner has any lease that has not lapsed.
pub async fn lease_owner_alive<C: GenericClient>(client: &C, owner: &str) -> Result<bool, DatastoreError> {
    let select = client
        .prepare_cached("SELECT EXISTS (SELECT FROM tidegate.leases WHERE owner = $1 AND expires_at >= now())")
        .await?;
    Ok(client.query_one(&select, &[&owner]).await?.get(0))
}
