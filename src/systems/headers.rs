//! What a system's headers say on when to come back: `Retry-After`, and the rate-limit headers in use.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::HttpResponse;

/// However long a system asks to stay away, it is asked again after this.
const LONGEST: Duration = Duration::from_secs(3600);

/// `Retry-After`, as seconds or as a date.
pub fn retry_after(response: &HttpResponse) -> Option<Duration> {
    let value = response.header("retry-after")?.trim();
    let wait = match value.parse::<f64>() {
        Ok(seconds) if seconds.is_finite() && seconds >= 0.0 => Duration::from_secs_f64(seconds.min(1e6)),
        Ok(_) => return None,
        Err(_) => until(DateTime::parse_from_rfc2822(value).ok()?.to_utc()),
    };
    Some(wait.min(LONGEST))
}

/// How long no connector of the system should send anything: what a 429 or 503 asks for, or what a used-up rate
/// limit says on any answer. A 429 that says nothing costs a second.
pub fn pause(response: &HttpResponse) -> Option<Duration> {
    let told = matches!(response.status, 429 | 503).then(|| retry_after(response)).flatten();
    let used_up = [("ratelimit-remaining", "ratelimit-reset"), ("x-ratelimit-remaining", "x-ratelimit-reset")]
        .iter()
        .find_map(|(remaining, reset)| {
            let left: f64 = response.header(remaining)?.trim().parse().ok()?;
            (left < 1.0).then(|| reset_in(response.header(reset)?)).flatten()
        });
    let told = told.max(used_up);
    match (told, response.status) {
        (None, 429) => Some(Duration::from_secs(1)),
        (told, _) => told.map(|wait| wait.min(LONGEST)),
    }
}

/// Seconds from now, or seconds since 1970 where the number is too large for that.
fn reset_in(value: &str) -> Option<Duration> {
    let seconds: f64 = value.trim().parse().ok()?;
    if !(0.0..1e12).contains(&seconds) {
        return None;
    }
    if seconds < 1e9 {
        return Some(Duration::from_secs_f64(seconds));
    }
    Some(until(DateTime::from_timestamp(seconds as i64, 0)?))
}

fn until(time: DateTime<Utc>) -> Duration {
    (time - Utc::now()).to_std().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(status: u16, headers: &[(&str, &str)]) -> HttpResponse {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        HttpResponse { status, headers, body: serde_json::Value::Null }
    }

    #[test]
    fn retry_after_is_read_as_seconds_and_as_a_date() {
        assert_eq!(retry_after(&response(429, &[("retry-after", "7")])), Some(Duration::from_secs(7)));
        let date = (Utc::now() + chrono::TimeDelta::seconds(90)).to_rfc2822();
        let wait = retry_after(&response(503, &[("retry-after", &date)]));
        assert!(wait.is_some_and(|wait| wait > Duration::from_secs(80) && wait <= Duration::from_secs(90)), "{wait:?}");
        assert_eq!(retry_after(&response(503, &[("retry-after", "soon")])), None);
        assert_eq!(retry_after(&response(503, &[("retry-after", "1e300")])), Some(LONGEST));
    }

    #[test]
    fn a_used_up_rate_limit_pauses_and_one_with_some_left_does_not() {
        let reset = (Utc::now().timestamp() + 20).to_string();
        let used_up = response(200, &[("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", &reset)]);
        assert!(pause(&used_up).is_some_and(|wait| wait > Duration::from_secs(15)));
        assert_eq!(
            pause(&response(200, &[("ratelimit-remaining", "0"), ("ratelimit-reset", "3")])),
            Some(Duration::from_secs(3))
        );
        assert_eq!(pause(&response(200, &[("ratelimit-remaining", "4"), ("ratelimit-reset", "3")])), None);
        assert_eq!(pause(&response(429, &[])), Some(Duration::from_secs(1)));
        assert_eq!(pause(&response(200, &[])), None);
    }
}
