//! Where to start reading, as people write it on the command line.

use chrono::{DateTime, NaiveDate, Utc};

use crate::event::Offset;
use crate::log::StartAt;

/// `beginning`, `end`, an offset, or a time.
pub fn start_at(text: &str) -> Result<StartAt, String> {
    match text {
        "beginning" => return Ok(StartAt::Beginning),
        "end" => return Ok(StartAt::End),
        _ => {}
    }
    if let Ok(offset) = text.parse::<i64>()
        && offset >= 0
    {
        return Ok(StartAt::Offset(Offset(offset)));
    }
    time_ms(text).map(StartAt::TimeMs).ok_or_else(|| {
        "it is beginning, end, an offset, or a time: 2026-11-21T08:00:00Z, 2026-11-21, -10m (s, m, h, d)".to_owned()
    })
}

/// A time as people write it, in ms since 1970.
pub fn time_ms(text: &str) -> Option<i64> {
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Some(time.timestamp_millis());
    }
    if let Ok(day) = NaiveDate::parse_from_str(text, "%Y-%m-%d") {
        return Some(day.and_hms_opt(0, 0, 0)?.and_utc().timestamp_millis());
    }
    let ago = text.strip_prefix('-')?;
    let unit = ago.char_indices().next_back()?.0;
    let number: i64 = ago[..unit].parse().ok()?;
    let seconds = match &ago[unit..] {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return None,
    };
    let ago = number.checked_mul(seconds)?.checked_mul(1000)?;
    Utc::now().timestamp_millis().checked_sub(ago)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_read_as_people_write_it() {
        assert_eq!(start_at("beginning"), Ok(StartAt::Beginning));
        assert_eq!(start_at("12"), Ok(StartAt::Offset(Offset(12))));
        assert_eq!(start_at("2026-11-21T08:00:00+01:00"), Ok(StartAt::TimeMs(1_795_244_400_000)));
        assert_eq!(start_at("1970-01-02"), Ok(StartAt::TimeMs(86_400_000)));
        let Ok(StartAt::TimeMs(ms)) = start_at("-10m") else { panic!() };
        assert!((Utc::now().timestamp_millis() - ms - 600_000).abs() < 5000);
        for wrong in ["", "yesterday", "-", "-10", "-10x", "-m", "-9999999999999999d"] {
            assert!(start_at(wrong).is_err(), "{wrong}");
        }
    }
}
