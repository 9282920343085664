//! When a pull runs: `every` so often, or by `cron` in a time zone.

use std::str::FromStr;
use std::time::Duration;

use chrono::{DateTime, Datelike, NaiveDate, NaiveDateTime, Timelike, Utc};
use croner::Cron;
use jiff::tz::TimeZone;

use crate::config::{ConfigError, Section, Spanned};

pub enum Schedule {
    Every(Duration),
    Cron { cron: Box<Cron>, zone: TimeZone },
}

impl Schedule {
    /// Takes `every`, or `cron` and `timezone`; every minute without either.
    pub fn read(section: &mut Section) -> Result<Self, ConfigError> {
        let every: Option<Duration> = section.take("every")?;
        let cron: Option<Spanned<String>> = section.take("cron")?;
        let zone: Option<Spanned<String>> = section.take("timezone")?;
        match (every, cron) {
            (Some(_), Some(cron)) => Err(ConfigError::new(&cron.place, "`every` and `cron` exclude each other")),
            (every, None) => {
                if let Some(zone) = zone {
                    return Err(ConfigError::new(&zone.place, "`timezone` goes with `cron` only"));
                }
                match every.unwrap_or(Duration::from_secs(60)) {
                    every if every < Duration::from_millis(100) => {
                        Err(section.error("every", "`every` must be at least 100ms"))
                    }
                    every => Ok(Schedule::Every(every)),
                }
            }
            (None, Some(text)) => {
                let cron = Cron::from_str(&text).map_err(|error| {
                    ConfigError::new(&text.place, format!("`cron` is no schedule: {error}"))
                        .hint("minute, hour, day, month, weekday: `0 3 * * *` is every day at 3")
                })?;
                let zone = match zone {
                    None => TimeZone::UTC,
                    Some(zone) => TimeZone::get(&zone).map_err(|_| {
                        ConfigError::new(&zone.place, format!("there is no time zone `{}`", *zone))
                            .hint("a name such as `Europe/Berlin` or `UTC`")
                    })?,
                };
                let schedule = Schedule::Cron { cron: Box::new(cron), zone };
                if schedule.after(Utc::now()).is_none() {
                    return Err(ConfigError::new(&text.place, "`cron` never comes"));
                }
                Ok(schedule)
            }
        }
    }

    /// When the run after the one that began at `last` is due; `None`: never. Without a last one, now.
    pub fn due(&self, last: Option<DateTime<Utc>>) -> Option<DateTime<Utc>> {
        match last {
            None => Some(DateTime::UNIX_EPOCH),
            Some(last) => self.after(last),
        }
    }

    fn after(&self, last: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self {
            Schedule::Every(every) => last.checked_add_signed(chrono::TimeDelta::from_std(*every).ok()?),
            Schedule::Cron { cron, zone } => {
                let stamp = jiff::Timestamp::from_second(last.timestamp()).ok()?;
                let civil = naive(stamp.to_zoned(zone.clone()).datetime())?;
                let next = cron.find_next_occurrence(&civil, false).ok()?;
                // Where clocks are put back, a wall time comes twice: the first of the two that is still to come
                // counts. Where they are put forward, one that does not come is as much later.
                let times = zone.to_ambiguous_zoned(civil_of(next)?);
                let utc = |zoned: jiff::Zoned| DateTime::from_timestamp(zoned.timestamp().as_second(), 0);
                let both = [utc(times.clone().compatible().ok()?)?, utc(times.later().ok()?)?];
                let due = both.into_iter().find(|time| *time > last)?;
                // What comes several times an hour goes on doing so in the hour that comes twice.
                let apart = next - civil;
                Some(if apart < chrono::TimeDelta::hours(1) && due - last > apart { last + apart } else { due })
            }
        }
    }
}

fn naive(time: jiff::civil::DateTime) -> Option<NaiveDateTime> {
    let date = NaiveDate::from_ymd_opt(time.year().into(), time.month() as u32, time.day() as u32)?;
    date.and_hms_opt(time.hour() as u32, time.minute() as u32, time.second() as u32)
}

fn civil_of(time: NaiveDateTime) -> Option<jiff::civil::DateTime> {
    let part = |value: u32| i8::try_from(value).ok();
    jiff::civil::DateTime::new(
        i16::try_from(time.year()).ok()?,
        part(time.month())?,
        part(time.day())?,
        part(time.hour())?,
        part(time.minute())?,
        part(time.second())?,
        0,
    )
    .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        DateTime::parse_from_rfc3339(text).unwrap().to_utc()
    }

    #[test]
    fn a_night_run_keeps_its_hour_when_clocks_change() {
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        let schedule = Schedule::Cron { cron: Box::new(Cron::from_str("0 3 * * *").unwrap()), zone };
        assert_eq!(schedule.after(at("2026-03-28T02:00:00Z")), Some(at("2026-03-29T01:00:00Z")));
        assert_eq!(schedule.after(at("2026-10-24T01:00:00Z")), Some(at("2026-10-25T02:00:00Z")));
        assert_eq!(schedule.due(None), Some(DateTime::UNIX_EPOCH));
    }

    #[test]
    fn a_frequent_run_goes_on_through_the_hour_that_comes_twice_and_the_one_that_does_not_come() {
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        let schedule = Schedule::Cron { cron: Box::new(Cron::from_str("*/20 * * * *").unwrap()), zone: zone.clone() };
        let mut times = vec![at("2026-10-24T23:50:00Z")];
        for _ in 0..11 {
            times.push(schedule.after(times[times.len() - 1]).unwrap());
        }
        let minutes: Vec<_> = times.windows(2).skip(1).map(|two| (two[1] - two[0]).num_minutes()).collect();
        assert_eq!(minutes, [20; 10], "{times:?}");
        // From within the second time of that hour, as after a run that took long.
        assert_eq!(schedule.after(at("2026-10-25T01:10:00Z")), Some(at("2026-10-25T01:20:00Z")));
        assert_eq!(schedule.after(at("2026-03-29T00:50:00Z")), Some(at("2026-03-29T01:00:00Z")));
        // A night run in the hour that does not come, runs; in the one that comes twice, at least once.
        let nightly = Schedule::Cron { cron: Box::new(Cron::from_str("30 2 * * *").unwrap()), zone };
        assert_eq!(nightly.after(at("2026-03-28T01:30:00Z")), Some(at("2026-03-29T01:30:00Z")));
        assert_eq!(nightly.after(at("2026-10-24T00:30:00Z")), Some(at("2026-10-25T00:30:00Z")));
    }

    #[test]
    fn a_run_is_due_after_its_period() {
        let schedule = Schedule::Every(Duration::from_secs(30));
        assert_eq!(schedule.due(Some(at("2026-01-01T00:00:00Z"))), Some(at("2026-01-01T00:00:30Z")));
    }
}
