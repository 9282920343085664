//! A system that fails, behind the fault proxy: what its client says became of a request, and what a pull makes of it.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;
use tidegate::systems::{Answer, BreakerState, HttpRequest};

use crate::support::{Api, Fault, Postgres, Proxy, Script, Stage, Version, eventually, system};

async fn behind_proxy(more: &str) -> (Api, Proxy, std::sync::Arc<tidegate::systems::System>) {
    let api = Api::start((1..=9).map(|id| json!({"id": id, "name": format!("part {id}")})).collect()).await;
    let proxy = Proxy::start(api.address).await;
    let system = system("api", &format!("base_url: {}/v1\n{more}", proxy.url()));
    (api, proxy, system)
}

fn get() -> HttpRequest {
    HttpRequest::new(Method::GET, "/all")
}

#[tokio::test]
async fn a_500_is_the_records_fault_while_the_probe_is_well_and_an_outage_when_it_is_not() {
    let (_api, proxy, system) = behind_proxy(
        "probe: GET /offset\nbreaker: { failures: 5, open: 200ms }\nerrors: [{ status: 422, then: retry }]",
    )
    .await;
    proxy.script(Script::on("GET", "/all", Fault::status(500)).times(2));
    let answer = system.send(&get()).await;
    assert!(matches!(&answer, Answer::Retry { response: Some(response), .. } if response.status == 500), "{answer:?}");
    assert_eq!(system.breaker(), BreakerState::Closed);
    proxy.script(Script::on("GET", "/offset", Fault::status(500)).times(2));
    let answer = system.send(&get()).await;
    assert!(matches!(answer, Answer::Unavailable { .. }), "{answer:?}");
    assert_eq!(system.breaker(), BreakerState::Open);
    // Nothing leaves meanwhile but the probe, which closes it.
    let before = proxy.count("GET", "/all");
    assert!(matches!(system.send(&get()).await, Answer::Unavailable { maybe_applied: false, .. }));
    assert_eq!(proxy.count("GET", "/all"), before);
    tokio::time::timeout(Duration::from_secs(10), system.wait_available()).await.expect("the probe closes it");
    assert!(matches!(system.send(&get()).await, Answer::Applied(_)));
    proxy.script(Script::on("GET", "/all", Fault::status(422)).times(1));
    assert!(matches!(system.send(&get()).await, Answer::Retry { .. }), "a rule goes before what the status means");
    assert_eq!(system.requests_sent(), 4);
}

#[tokio::test]
async fn a_429_pauses_every_request_of_the_system() {
    let (_api, proxy, system) = behind_proxy("").await;
    proxy.script(Script::any(Fault::retry_after(429, 1)).times(1));
    let answer = system.send(&get()).await;
    assert!(matches!(answer, Answer::Retry { after: Some(_), response: None, .. }), "{answer:?}");
    let start = Instant::now();
    assert!(matches!(system.send(&get()).await, Answer::Applied(_)));
    assert!(start.elapsed() > Duration::from_millis(900), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_request_that_waited_for_its_turn_leaves_only_if_it_still_may() {
    let (_api, proxy, system) = behind_proxy("budget: { requests: 1, per: 1s }").await;
    assert!(matches!(system.send(&get()).await, Answer::Applied(_)));
    let may = std::sync::atomic::AtomicBool::new(true);
    let ready = || match may.load(std::sync::atomic::Ordering::Relaxed) {
        true => Ok(()),
        false => Err("it is another's now".to_owned()),
    };
    let request = get();
    let (answer, ()) = tokio::join!(system.send_if(&request, &ready), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        may.store(false, std::sync::atomic::Ordering::Relaxed);
    });
    let Answer::Retry { response: None, reason, .. } = &answer else { panic!("{answer:?}") };
    assert!(reason.contains("another's"), "{reason}");
    assert_eq!((proxy.count("GET", "/all"), system.breaker()), (1, BreakerState::Closed));
    may.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(matches!(system.send_if(&request, &ready).await, Answer::Applied(_)));
}

#[tokio::test]
async fn what_may_have_been_applied_is_uncertain_and_what_was_never_sent_is_not() {
    let (api, proxy, system) = behind_proxy("timeouts: { request: 400ms }\nbreaker: { failures: 100 }").await;
    let mut create = HttpRequest::new(Method::POST, "/login");
    create.body = Some(json!({"secret": "sesame"}));
    for fault in [Fault::LoseAnswer { hold: Duration::from_secs(5) }, Fault::ResetAfter] {
        proxy.script(Script::on("POST", "", fault.clone()).times(1));
        let answer = system.send(&create).await;
        assert!(matches!(answer, Answer::Uncertain { .. }), "{fault:?}: {answer:?}");
    }
    assert_eq!(api.inside.lock().unwrap().logins, 2, "applied both times");
    api.inside.lock().unwrap().token = None;
    proxy.script(Script::on("GET", "", Fault::ResetAfter).times(1));
    let answer = system.send(&get()).await;
    assert!(matches!(answer, Answer::Retry { response: None, .. }), "{answer:?}");
    proxy.down();
    let answer = system.send(&create).await;
    assert!(matches!(answer, Answer::Unavailable { maybe_applied: false, .. }), "{answer:?}");
}

/// The API behind TLS, with a certificate of an authority that nobody knows.
async fn behind_tls(server: std::net::SocketAddr, folder: &std::path::Path) -> (String, tokio::task::JoinHandle<()>) {
    use rustls::pki_types::pem::PemObject;
    crate::support::postgres::certificate(folder);
    let certificate = rustls::pki_types::CertificateDer::from_pem_file(folder.join("server.crt")).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::from_pem_file(folder.join("server.key")).unwrap();
    let settings =
        rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(settings));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}/v1", listener.local_addr().unwrap().port());
    let serving = tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut client) = acceptor.accept(client).await else { return };
                let mut server = tokio::net::TcpStream::connect(server).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    (url, serving)
}

#[tokio::test]
async fn a_system_behind_tls_is_spoken_to_when_its_authority_is_trusted() {
    let api = Api::start(vec![json!({"id": 1})]).await;
    crate::support::http();
    let folder = tempfile::tempdir().unwrap();
    let (url, serving) = behind_tls(api.address, folder.path()).await;
    let trusting = format!("base_url: {url}\nsslrootcert: {}/root.crt", folder.path().display());
    let answer = system("api", &trusting).send(&get()).await;
    assert!(matches!(&answer, Answer::Applied(response) if response.body[0]["id"] == 1), "{answer:?}");
    let answer = system("api", &format!("base_url: {url}")).send(&get()).await;
    let Answer::Unavailable { reason, maybe_applied: false, .. } = &answer else { panic!("{answer:?}") };
    assert!(reason.contains("certificate"), "{reason}");
    assert_eq!(api.asked().len(), 1, "nothing was sent to a stranger");
    // And not to one whose name is another than the certificate's.
    let other = trusting.replace("localhost", "127.0.0.2");
    assert!(matches!(system("api", &other).send(&get()).await, Answer::Unavailable { maybe_applied: false, .. }));
    serving.abort();
}

#[tokio::test]
async fn a_login_is_made_once_for_all_who_wait_and_again_when_its_token_is_refused() {
    let auth = r#"auth:
  type: login
  request: POST /login
  body: '{secret: $secret}'
  secret: sesame
  header: "Authorization: Session {{ .token }}"
budget: { concurrency: 8 }
"#;
    let (api, proxy, system) = behind_proxy(auth).await;
    let all = || async {
        let requests = (0..8).map(|_| {
            let system = std::sync::Arc::clone(&system);
            tokio::spawn(async move { system.send(&get()).await })
        });
        for answer in futures::future::join_all(requests).await {
            let answer = answer.unwrap();
            assert!(matches!(answer, Answer::Applied(_)), "{answer:?}");
        }
    };
    all().await;
    assert_eq!(proxy.count("POST", "/login"), 1);
    api.inside.lock().unwrap().token = Some("Session another".to_owned());
    all().await;
    assert_eq!(proxy.count("POST", "/login"), 2);
    assert_eq!(system.requests_by_purpose()["login"], 2);
}

#[tokio::test]
async fn a_pull_brings_every_record_once_through_a_storm() {
    let database = Postgres::shared(Version::Distribution).await.database("storm").await;
    database.execute("CREATE TABLE parts (id serial PRIMARY KEY, name text UNIQUE)").await;
    let client = database.connect().await;
    let api = Api::start((1..=40).map(|id| json!({"id": id, "name": format!("part {id}")})).collect()).await;
    let proxy = Proxy::start(api.address).await;
    for (chance, fault) in [
        (0.1, Fault::status(500)),
        (0.1, Fault::status(503)),
        (0.1, Fault::ResetBefore),
        (0.1, Fault::ResetAfter),
        (0.05, Fault::retry_after(429, 0)),
        (0.1, Fault::Delay(Duration::from_millis(50))),
        (0.05, Fault::LoseAnswer { hold: Duration::from_secs(5) }),
    ] {
        proxy.script(Script::on("GET", "/offset", fault).chance(chance).times(3));
    }
    let settings = format!(
        "base_url: {}/v1\ntimeouts: {{ request: 300ms }}\nprobe: GET /all\nbreaker: {{ failures: 3, open: 100ms }}",
        proxy.url()
    );
    let stage = Stage::new(&database, &[("api", &settings)]).await;
    let running = stage.start(
        "name: parts\ntype: http-pull\nsystem: api\nobject: part\nevery: 100ms\nrequest: GET /offset\n\
         paginator: { type: offset, limit: 4 }\ninto: public.parts\nmap: '{ name }'\n",
    );
    eventually(Duration::from_secs(60), "every record is there", async || {
        let count: i64 = client.query_one("SELECT count(*) FROM parts", &[]).await.unwrap().get(0);
        if count >= 40 { Ok(()) } else { Err(format!("{count} {:?}", running.status.last_error())) }
    })
    .await;
    proxy.clear();
    let row = client
        .query_one("SELECT count(*), count(DISTINCT name), (SELECT count(*) FROM tidegate.links) FROM parts", &[])
        .await
        .unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i64>(2)), (40, 40, 40));
    running.stop().await.unwrap();
}
