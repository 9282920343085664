//! A system's client against a server that misbehaves: logins, redirects, bounds, and what the probe can't tell.

use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use tidegate::systems::{Answer, BreakerState, HttpRequest, System};
use tokio::time::Instant;

use crate::support::{Scripted, Told, eventually, system};

fn get(path: &str) -> HttpRequest {
    HttpRequest::new(Method::GET, path)
}

async fn all_at_once(system: &Arc<System>, count: usize) -> Vec<Answer> {
    let requests = (0..count).map(|_| {
        let system = Arc::clone(system);
        tokio::spawn(async move { system.send(&get("/data")).await })
    });
    futures::future::join_all(requests).await.into_iter().map(Result::unwrap).collect()
}

const LOGIN: &str = "auth: { type: login, request: POST /login, header: 'Authorization: Bearer {{ .token }}' }\n\
    breaker: { failures: 100 }\n";

#[tokio::test]
async fn a_login_that_is_refused_is_asked_once_for_all_who_wait_and_then_at_a_pace() {
    let server = Scripted::start(|_| Told::status(401).after(Duration::from_millis(100))).await;
    let system = system("api", &format!("base_url: {}\n{LOGIN}", server.url()));
    let began = Instant::now();
    for answer in all_at_once(&system, 20).await {
        assert!(matches!(&answer, Answer::Unavailable { reason, .. } if reason.contains("login")), "{answer:?}");
    }
    assert_eq!(server.count("/login"), 1);
    while began.elapsed() < Duration::from_millis(2500) {
        all_at_once(&system, 5).await;
    }
    assert!(server.count("/login") <= 4, "{} logins in {:?}", server.count("/login"), began.elapsed());
    assert_eq!(server.count("/data"), 0);
}

#[tokio::test]
async fn a_system_that_refuses_every_token_is_not_stormed_with_logins() {
    let server = Scripted::start(|asked| match asked.path.as_str() {
        "/login" => json!({"token": "t"}).into(),
        _ => Told::status(401),
    })
    .await;
    let system = system("api", &format!("base_url: {}\n{LOGIN}", server.url()));
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(2500) {
        all_at_once(&system, 10).await;
    }
    let most = began.elapsed().as_secs() as usize + 2;
    assert!(server.count("/login") <= most, "{} logins in {:?}", server.count("/login"), began.elapsed());
}

#[tokio::test]
async fn every_hop_of_a_redirect_has_its_turn_in_the_budget() {
    let server = Scripted::start(|asked| match asked.path.as_str() {
        "/data" => Told::status(302).header("location", "/moved"),
        "/moved" => Told::status(307).header("location", "/there"),
        _ => json!("here").into(),
    })
    .await;
    let system = system("api", &format!("base_url: {}\nbudget: {{ requests: 3, per: 500ms }}", server.url()));
    for _ in 0..4 {
        let answer = system.send(&get("/data")).await;
        assert!(matches!(&answer, Answer::Applied(response) if response.body == "here"), "{answer:?}");
    }
    let asked = server.asked();
    assert_eq!(asked.len(), 12);
    for window in asked.windows(4) {
        let apart = window[3].at - window[0].at;
        assert!(apart > Duration::from_millis(450), "4 requests within {apart:?}");
    }
}

#[tokio::test]
async fn no_redirect_leads_elsewhere_and_none_goes_round_for_ever() {
    let stranger = Scripted::start(|_| json!([]).into()).await;
    let elsewhere = stranger.url();
    let server = Scripted::start(move |asked| match asked.path.as_str() {
        "/round" => Told::status(302).header("location", "/round"),
        _ => Told::status(302).header("location", format!("{elsewhere}/data")),
    })
    .await;
    let system = system("api", &format!("base_url: {}\nauth: {{ type: bearer, token: s3cr3t-t0ken }}", server.url()));
    assert!(matches!(system.send(&get("/data")).await, Answer::Rejected { .. }));
    assert_eq!(stranger.asked().len(), 0);
    let answer = system.send(&get("/round")).await;
    assert!(
        matches!(&answer, Answer::Rejected { reason, .. } if reason.contains("redirected more than")),
        "{answer:?}"
    );
}

#[tokio::test]
async fn what_unpacks_to_more_than_the_limit_is_refused_and_so_is_what_never_ends() {
    let packed = std::process::Command::new("sh")
        .args(["-c", "head -c 209715200 /dev/zero | tr '\\0' ' ' | gzip -9"])
        .output()
        .unwrap()
        .stdout;
    assert!((1000..1 << 20).contains(&packed.len()), "{}", packed.len());
    let server = Scripted::start(move |_| {
        Told::status(200)
            .header("content-encoding", "gzip")
            .header("content-type", "application/json")
            .body(packed.clone())
    })
    .await;
    let settings = "response.limit: 1mb\nbreaker: { failures: 1, open: 200ms }";
    let system = system("api", &format!("base_url: {}\n{settings}", server.url()));
    let answer = system.send(&get("/data")).await;
    assert!(matches!(&answer, Answer::Rejected { reason, .. } if reason.contains("longer than 1mb")), "{answer:?}");
    assert_eq!(system.breaker(), BreakerState::Closed);

    // A byte now and then, for ever.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let dripping = tokio::spawn(async move {
        use tokio::io::AsyncWriteExt;
        let (mut client, _) = listener.accept().await.unwrap();
        client.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n").await.unwrap();
        while client.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let system = crate::support::system("slow", &format!("base_url: {url}\ntimeouts: {{ request: 600ms }}"));
    let began = Instant::now();
    let answer = system.send(&get("/data")).await;
    assert!(matches!(&answer, Answer::Retry { response: None, .. }), "{answer:?}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    dripping.abort();
}

#[tokio::test]
async fn headers_repeat_for_a_list_and_the_requests_own_go_before_the_systems() {
    let server =
        Scripted::start(|_| Told::status(200).body(b"\xef\xbb\xbf{\"a\": 12345678901234567890.10}".as_slice())).await;
    let system = system("api", &format!("base_url: {}\nheaders: {{ X-A: [one, two], X-B: system }}", server.url()));
    let mut request = get("/data");
    request.headers = vec![("x-b".to_owned(), "first".to_owned()), ("X-B".to_owned(), "second".to_owned())];
    let answer = system.send(&request).await;
    let Answer::Applied(response) = &answer else { panic!("{answer:?}") };
    assert_eq!(response.body["a"].to_string(), "12345678901234567890.10", "behind a byte order mark");
    let asked = &server.asked()[0];
    let values = |name: &str| {
        asked.headers.get_all(name).iter().map(|value| value.to_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(values("x-a"), ["one", "two"]);
    assert_eq!(values("x-b"), ["first", "second"]);
}

#[tokio::test]
async fn a_probe_without_a_turn_in_the_budget_tells_of_no_outage() {
    let server = Scripted::start(|asked| match asked.path.as_str() {
        "/probe" => json!("well").into(),
        _ => Told::status(500),
    })
    .await;
    let settings = "probe: GET /probe\nbudget: { requests: 1, per: 1m }\ntimeouts: { turn: 200ms, probe: 100ms }";
    let system = system("api", &format!("base_url: {}\n{settings}", server.url()));
    let answer = system.send(&get("/data")).await;
    assert!(
        matches!(&answer, Answer::Retry { response: None, reason, .. } if reason.contains("no turn")),
        "{answer:?}"
    );
    assert_eq!(system.breaker(), BreakerState::Closed);
    // Whether a request that changes something was applied is not known either.
    let system = crate::support::system("api", &format!("base_url: {}\n{settings}", server.url()));
    let answer = system.send(&HttpRequest::new(Method::POST, "/data")).await;
    assert!(matches!(&answer, Answer::Uncertain { reason } if reason.contains("no turn")), "{answer:?}");
}

#[tokio::test]
async fn a_token_is_hidden_while_another_is_asked_for_and_after() {
    let mut logins = 0;
    let server = Scripted::start(move |asked| match asked.path.as_str() {
        "/login" => {
            logins += 1;
            let told: Told = json!({"token": format!("t{logins}-s3cr3t")}).into();
            told.after(Duration::from_millis(if logins == 1 { 0 } else { 1500 }))
        }
        // It says back what it was asked with.
        "/echo" => Told::status(422)
            .body(format!("{:?}", asked.headers["authorization"].to_str().unwrap()))
            .after(Duration::from_millis(800)),
        _ => Told::status(401),
    })
    .await;
    let system = system("api", &format!("base_url: {}\n{LOGIN}", server.url()));
    let hidden = |answer: Answer| match answer {
        Answer::Rejected { response, reason } => {
            let shown = format!("{reason} {}", system.shown(&response));
            assert!(shown.contains("***") && !shown.contains("s3cr3t"), "{shown}");
        }
        other => panic!("{other:?}"),
    };
    hidden(system.send(&get("/echo")).await);
    let echo = tokio::spawn({
        let system = Arc::clone(&system);
        async move { system.send(&get("/echo")).await }
    });
    eventually(Duration::from_secs(10), "asked", async || server.count("/echo") == 2).await;
    // While its answer is under way, somebody else needs a new token.
    let data = get("/data");
    let (echo, refused) = tokio::join!(echo, system.send(&data));
    hidden(echo.unwrap());
    assert!(matches!(refused, Answer::Unavailable { .. }), "{refused:?}");
    assert_eq!(server.count("/login"), 2);
}

#[tokio::test]
async fn a_breaker_that_stays_open_says_what_its_probe_finds() {
    let server = Scripted::start(|asked| match asked.path.as_str() {
        "/prboe" => Told::status(404).body("\"no such page\""),
        _ => Told::status(503),
    })
    .await;
    let settings = "probe: GET /prboe\nbreaker: { failures: 1, open: 100ms }";
    let system = system("api", &format!("base_url: {}\n{settings}", server.url()));
    assert!(matches!(system.send(&get("/data")).await, Answer::Unavailable { .. }));
    eventually(Duration::from_secs(10), "what the probe finds", async || {
        let reason = system.breaker_reason();
        if reason.contains("answered 503")
            && reason.contains("the probe answered 404")
            && reason.contains("is `probe` right?")
        {
            Ok(())
        } else {
            Err(reason)
        }
    })
    .await;
    assert_eq!(system.breaker(), BreakerState::Open);
}
