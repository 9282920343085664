//! How long work tells how far it is: rows, rate, and the time that is left at that rate. One line, the same
//! wherever it is shown.

/// `snapshot: 12400 of about 60000 rows, 2500 rows/s, about 19 s left`. Without a rate there is no time left to tell.
pub fn progress(what: &str, done: u64, total: u64, unit: &str, per_second: f64) -> String {
    let total = total.max(done);
    let mut line = format!("{what}: {done} of about {total} {unit}, {per_second:.0} {unit}/s");
    if per_second >= 0.5 {
        line.push_str(&format!(", about {} left", seconds((total - done) as f64 / per_second)));
    }
    line
}

/// `850 ms`, `12 s`, `3m 20s`, `2h 5m`
pub fn seconds(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0 if seconds <= 0.0 => "0 s".to_owned(),
        0 => format!("{:.0} ms", seconds * 1000.0),
        1..60 => format!("{whole} s"),
        60..3600 => format!("{}m {}s", whole / 60, whole % 60),
        3600..172_800 => format!("{}h {}m", whole / 3600, whole / 60 % 60),
        _ => format!("{}d {}h", whole / 86_400, whole / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_well() {
        for (given, text) in
            [(0.0, "0 s"), (-1.0, "0 s"), (0.85, "850 ms"), (59.9, "59 s"), (200.0, "3m 20s"), (7500.0, "2h 5m")]
        {
            assert_eq!(seconds(given), text);
        }
        assert_eq!(seconds(200_000.0), "2d 7h");
    }

    #[test]
    fn progress_has_rows_rate_and_time_left() {
        assert_eq!(
            progress("replay", 1000, 4000, "records", 100.0),
            "replay: 1000 of about 4000 records, 100 records/s, about 30 s left"
        );
        assert_eq!(progress("replay", 0, 10, "records", 0.0), "replay: 0 of about 10 records, 0 records/s");
        assert!(progress("snapshot", 12, 10, "rows", 5.0).contains("12 of about 12 rows"), "an estimate may be passed");
    }
}
