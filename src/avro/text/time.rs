//! Dates, times, timestamps and intervals, in PostgreSQL's ISO forms. Years reach from 4713 BC to 294276 AD.

use std::io::Write;

use crate::avro::error::TextError;

pub(in crate::avro) const MICROS_PER_SECOND: i64 = 1_000_000;
pub(in crate::avro) const MICROS_PER_DAY: i64 = 86_400 * MICROS_PER_SECOND;

/// A point that may lie at either end of all time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::avro) enum Instant {
    NegativeInfinity,
    /// Days or microseconds since 1970-01-01.
    At(i64),
    Infinity,
}

const MALFORMED_DATE: TextError = TextError::Malformed("not an ISO date (the session needs DateStyle ISO)");
const MALFORMED_TIME: TextError = TextError::Malformed("not a time of day");

/// Days from 1970-01-01 to a day of the proleptic Gregorian calendar, year 0 being 1 BC.
pub(in crate::avro) fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let shifted = if month <= 2 { year - 1 } else { year };
    let era = shifted.div_euclid(400);
    let year_of_era = shifted.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// The inverse of [`days_from_civil`].
pub(in crate::avro) fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

fn number(digits: &[u8], most: usize) -> Option<i64> {
    if digits.is_empty() || digits.len() > most || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(digits.iter().fold(0, |value, digit| value * 10 + i64::from(digit - b'0')))
}

fn infinity(text: &[u8]) -> Option<Instant> {
    match text {
        b"infinity" => Some(Instant::Infinity),
        b"-infinity" => Some(Instant::NegativeInfinity),
        _ => None,
    }
}

/// Splits ` BC` off; true when it was there.
fn split_era(text: &[u8]) -> (&[u8], bool) {
    match text.strip_suffix(b" BC") {
        Some(rest) => (rest, true),
        None => (text, false),
    }
}

fn civil_date(text: &[u8], before_christ: bool) -> Option<i64> {
    // `YYYY-MM-DD` with four to seven digits of year.
    let (year, rest) = text.split_at_checked(text.len().checked_sub(6)?)?;
    let [b'-', month @ .., b'-', day1, day2] = rest else { return None };
    let (year, month, day) = (number(year, 7)?, number(month, 2)?, number(&[*day1, *day2], 2)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    Some(days_from_civil(if before_christ { 1 - year } else { year }, month, day))
}

/// `date`: days since 1970-01-01.
pub(in crate::avro) fn date(text: &[u8]) -> Result<Instant, TextError> {
    if let Some(infinity) = infinity(text) {
        return Ok(infinity);
    }
    let (text, before_christ) = split_era(text);
    civil_date(text, before_christ).map(Instant::At).ok_or(MALFORMED_DATE)
}

/// `HH:MM:SS[.ffffff]`: microseconds since midnight, up to and with 24:00.
fn time_of_day(text: &[u8]) -> Option<i64> {
    let [h1, h2, b':', m1, m2, b':', s1, s2, rest @ ..] = text else { return None };
    let (hours, minutes, seconds) = (number(&[*h1, *h2], 2)?, number(&[*m1, *m2], 2)?, number(&[*s1, *s2], 2)?);
    if hours > 24 || minutes > 59 || seconds > 60 {
        return None;
    }
    let micros = match rest {
        [] => 0,
        [b'.', fraction @ ..] => number(fraction, 6)? * 10i64.pow(6 - fraction.len() as u32),
        _ => return None,
    };
    Some(((hours * 60 + minutes) * 60 + seconds) * MICROS_PER_SECOND + micros)
}

/// `time`: microseconds since midnight.
pub(in crate::avro) fn time(text: &[u8]) -> Result<i64, TextError> {
    time_of_day(text).filter(|micros| *micros <= MICROS_PER_DAY).ok_or(MALFORMED_TIME)
}

/// Splits a zone (`+02`, `-03:30`, `+00:00:20`) off; its seconds east of UTC.
fn split_zone(text: &[u8]) -> Option<(&[u8], i64)> {
    let at = text.iter().rposition(|b| matches!(b, b'+' | b'-'))?;
    let sign = if text[at] == b'-' { -1 } else { 1 };
    let mut seconds = 0;
    let mut weight = 3600;
    for part in text[at + 1..].split(|&b| b == b':') {
        if part.len() != 2 || weight == 0 {
            return None;
        }
        seconds += number(part, 2)? * weight;
        weight /= 60;
    }
    Some((&text[..at], sign * seconds))
}

/// `timetz`: microseconds since midnight UTC; 24:00 stays where the zone is UTC.
pub(in crate::avro) fn time_with_zone(text: &[u8]) -> Result<i64, TextError> {
    let (clock, zone) = split_zone(text).ok_or(TextError::Malformed("not a time of day with a zone"))?;
    let micros = time(clock)?;
    if zone == 0 {
        return Ok(micros);
    }
    Ok((micros - zone * MICROS_PER_SECOND).rem_euclid(MICROS_PER_DAY))
}

/// Date and time of day, blank between.
fn date_and_time(text: &[u8], before_christ: bool) -> Option<i64> {
    let blank = text.iter().position(|&b| b == b' ')?;
    let days = civil_date(&text[..blank], before_christ)?;
    days.checked_mul(MICROS_PER_DAY)?.checked_add(time_of_day(&text[blank + 1..])?)
}

/// `timestamp`: microseconds since 1970-01-01 00:00.
pub(in crate::avro) fn timestamp(text: &[u8]) -> Result<Instant, TextError> {
    if let Some(infinity) = infinity(text) {
        return Ok(infinity);
    }
    let (text, before_christ) = split_era(text);
    date_and_time(text, before_christ).map(Instant::At).ok_or(TextError::Malformed("not an ISO timestamp"))
}

/// `timestamptz`: microseconds since 1970-01-01 00:00 UTC.
pub(in crate::avro) fn timestamp_with_zone(text: &[u8]) -> Result<Instant, TextError> {
    if let Some(infinity) = infinity(text) {
        return Ok(infinity);
    }
    let (text, before_christ) = split_era(text);
    // The sign of a zone stands after the blank; a date's dashes before it.
    let parsed = text.iter().position(|&b| b == b' ').and_then(|_| {
        let (local, zone) = split_zone(text)?;
        date_and_time(local, before_christ)?.checked_sub(zone * MICROS_PER_SECOND)
    });
    parsed.map(Instant::At).ok_or(TextError::Malformed("not an ISO timestamp with a zone"))
}

/// `interval` in its parts; days and months have no fixed length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::avro) struct Interval {
    pub months: i64,
    pub days: i64,
    pub micros: i64,
}

/// `1 year 2 mons 3 days 04:05:06.789012`, in IntervalStyle postgres.
pub(in crate::avro) fn interval(text: &[u8]) -> Result<Interval, TextError> {
    const MALFORMED: TextError = TextError::Malformed("not an interval in IntervalStyle postgres");
    const RANGE: TextError = TextError::Malformed("the interval is out of range");
    let mut out = Interval::default();
    let mut words = text.split(|&b| b == b' ').filter(|word| !word.is_empty()).peekable();
    if words.peek().is_none() {
        return Err(MALFORMED);
    }
    while let Some(word) = words.next() {
        let (negative, unsigned) = match word {
            [b'-', rest @ ..] => (true, rest),
            [b'+', rest @ ..] => (false, rest),
            rest => (false, rest),
        };
        let signed = |value: i64| if negative { -value } else { value };
        if unsigned.contains(&b':') {
            // Hours may have any number of digits.
            let colon = unsigned.iter().position(|&b| b == b':').ok_or(MALFORMED)?;
            let hours = number(&unsigned[..colon], 18).ok_or(MALFORMED)?;
            let mut rest = *b"00:00:00.000000";
            let tail = &unsigned[colon..];
            rest.get_mut(2..2 + tail.len()).ok_or(MALFORMED)?.copy_from_slice(tail);
            let within_hour = time_of_day(&rest).ok_or(MALFORMED)?;
            let micros =
                hours.checked_mul(3600 * MICROS_PER_SECOND).and_then(|m| m.checked_add(within_hour)).ok_or(RANGE)?;
            out.micros = out.micros.checked_add(signed(micros)).ok_or(RANGE)?;
            continue;
        }
        let value = signed(number(unsigned, 12).ok_or(MALFORMED)?);
        match words.next().ok_or(MALFORMED)? {
            b"year" | b"years" => out.months += value * 12,
            b"mon" | b"mons" => out.months += value,
            b"day" | b"days" => out.days += value,
            _ => return Err(MALFORMED),
        }
    }
    Ok(out)
}

impl Interval {
    /// Microseconds, a month being 365.25 / 12 days; what does not fit stays at the end of the range.
    pub fn saturating_micros(self) -> i64 {
        const MICROS_PER_MONTH: i128 = 2_629_800_000_000;
        let total = i128::from(self.months) * MICROS_PER_MONTH
            + i128::from(self.days) * i128::from(MICROS_PER_DAY)
            + i128::from(self.micros);
        total.clamp(i64::MIN.into(), i64::MAX.into()) as i64
    }

    /// `P1Y2M3DT4H5M6.789012S`, every part always there.
    pub fn put_iso(self, out: &mut Vec<u8>) {
        let (years, months) = (self.months / 12, self.months % 12);
        let (hours, minutes) = (self.micros / (3600 * MICROS_PER_SECOND), self.micros / (60 * MICROS_PER_SECOND) % 60);
        let seconds = self.micros % (60 * MICROS_PER_SECOND);
        let sign = if seconds < 0 { "-" } else { "" };
        // Writing to a Vec does not fail.
        let _ = write!(out, "P{years}Y{months}M{}DT{hours}H{minutes}M{sign}", self.days);
        let _ = write!(out, "{}", seconds.abs() / MICROS_PER_SECOND);
        put_trimmed_fraction(seconds.abs() % MICROS_PER_SECOND, out);
        out.push(b'S');
    }
}

impl Interval {
    /// `PT26H1M30.5S`: only the parts that are not zero, days and months aside.
    pub fn put_short_iso(self, out: &mut Vec<u8>) {
        let hours = self.micros / (3600 * MICROS_PER_SECOND);
        let minutes = self.micros / (60 * MICROS_PER_SECOND) % 60;
        let seconds = self.micros % (60 * MICROS_PER_SECOND);
        out.extend_from_slice(b"PT");
        if hours != 0 {
            let _ = write!(out, "{hours}H");
        }
        if minutes != 0 {
            let _ = write!(out, "{minutes}M");
        }
        if seconds != 0 || self.micros == 0 {
            let sign = if seconds < 0 { "-" } else { "" };
            let _ = write!(out, "{sign}{}", seconds.abs() / MICROS_PER_SECOND);
            put_trimmed_fraction(seconds.abs() % MICROS_PER_SECOND, out);
            out.push(b'S');
        }
    }
}

/// `.5` for 500000; nothing for 0.
pub(in crate::avro) fn put_trimmed_fraction(mut micros: i64, out: &mut Vec<u8>) {
    if micros == 0 {
        return;
    }
    let mut width = 6;
    while micros % 10 == 0 {
        micros /= 10;
        width -= 1;
    }
    out.push(b'.');
    put_padded(micros, width, out);
}

fn put_padded(value: i64, width: usize, out: &mut Vec<u8>) {
    let start = out.len();
    let mut rest = value;
    for _ in 0..width {
        out.push(b'0' + (rest % 10) as u8);
        rest /= 10;
    }
    out[start..].reverse();
}

/// `2026-07-04`, `-0043-03-15`, `+10000-01-01`: ISO 8601 as java.time writes it.
pub(in crate::avro) fn put_iso_date(days: i64, out: &mut Vec<u8>) {
    let (year, month, day) = civil_from_days(days);
    match year {
        0..=9999 => put_padded(year, 4, out),
        10_000.. => {
            let _ = write!(out, "+{year}");
        }
        _ => {
            out.push(b'-');
            let digits = if year < -9999 { (year.ilog10_of_abs() + 1) as usize } else { 4 };
            put_padded(-year, digits, out);
        }
    }
    out.push(b'-');
    put_padded(month, 2, out);
    out.push(b'-');
    put_padded(day, 2, out);
}

trait DigitsOfAbs {
    fn ilog10_of_abs(self) -> u32;
}

impl DigitsOfAbs for i64 {
    fn ilog10_of_abs(self) -> u32 {
        self.unsigned_abs().checked_ilog10().unwrap_or(0)
    }
}

/// `10:34:56`, then the fraction: of `digits` digits, or as many as it needs.
pub(in crate::avro) fn put_iso_time(micros: i64, digits: Option<u32>, out: &mut Vec<u8>) {
    let seconds = micros / MICROS_PER_SECOND;
    put_padded(seconds / 3600, 2, out);
    out.push(b':');
    put_padded(seconds / 60 % 60, 2, out);
    out.push(b':');
    put_padded(seconds % 60, 2, out);
    let fraction = micros % MICROS_PER_SECOND;
    match digits {
        None => put_trimmed_fraction(fraction, out),
        Some(0) => {}
        Some(digits) => {
            out.push(b'.');
            put_padded(fraction / 10i64.pow(6 - digits.min(6)), digits.min(6) as usize, out);
        }
    }
}

/// `2026-07-04T10:34:56.789012`, without a zone.
pub(in crate::avro) fn put_iso_timestamp(micros: i64, digits: Option<u32>, out: &mut Vec<u8>) {
    put_iso_date(micros.div_euclid(MICROS_PER_DAY), out);
    out.push(b'T');
    put_iso_time(micros.rem_euclid(MICROS_PER_DAY), digits, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn days_and_dates_are_inverse() {
        for days in (-2_500_000..110_000_000).step_by(9973).chain([-719_162, -719_163, -141_432, 0, 20_638]) {
            let (year, month, day) = civil_from_days(days);
            assert_eq!(days_from_civil(year, month, day), days);
        }
    }

    #[test]
    fn dates_reach_from_bc_to_far_ahead() {
        for (text, days) in [
            ("1970-01-01", 0),
            ("2026-07-04", 20_638),
            ("0001-01-01", -719_162),
            ("1582-10-10", -141_432),
            ("0044-03-15 BC", -735_160),
        ] {
            assert_eq!(date(text.as_bytes()), Ok(Instant::At(days)), "{text}");
        }
        assert!(matches!(date(b"5874897-12-31"), Ok(Instant::At(_))));
        assert_eq!(date(b"-infinity"), Ok(Instant::NegativeInfinity));
        for text in ["", "2026", "07/04/2026", "2026-13-01", "2026-01-32", "2026-1-1", "today"] {
            assert!(date(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn times_and_zones() {
        assert_eq!(time(b"24:00:00"), Ok(MICROS_PER_DAY));
        assert_eq!(time(b"12:34:56.789012"), Ok(45_296_789_012));
        assert!(time(b"24:00:01").is_err() && time(b"12:34").is_err() && time(b"12:34:56.").is_err());
        assert_eq!(time_with_zone(b"24:00:00+00"), Ok(MICROS_PER_DAY));
        assert_eq!(time_with_zone(b"01:02:03+05:30"), Ok(70_323_000_000));
        assert_eq!(time_with_zone(b"23:59:59.999999-12"), Ok(43_199_999_999));
        assert_eq!(timestamp(b"0044-03-15 12:00:00 BC"), Ok(Instant::At(-63_517_780_800_000_000)));
        assert_eq!(timestamp_with_zone(b"0044-03-15 12:00:00+00 BC"), Ok(Instant::At(-63_517_780_800_000_000)));
        assert_eq!(timestamp_with_zone(b"2026-07-04 12:34:56.789012+02"), Ok(Instant::At(1_783_161_296_789_012)));
        assert_eq!(timestamp_with_zone(b"1892-04-01 00:00:00+00:53:28"), timestamp(b"1892-03-31 23:06:32"));
        assert!(timestamp_with_zone(b"2026-07-04 12:34:56").is_err());
    }

    #[test]
    fn iso_texts_are_as_java_writes_them() {
        assert_eq!(written(|out| put_iso_date(-735_160, out)), "-0043-03-15");
        assert_eq!(written(|out| put_iso_date(2_932_897, out)), "+10000-01-01");
        assert_eq!(written(|out| put_iso_timestamp(-1, Some(6), out)), "1969-12-31T23:59:59.999999");
        assert_eq!(written(|out| put_iso_timestamp(0, Some(3), out)), "1970-01-01T00:00:00.000");
        assert_eq!(written(|out| put_iso_time(39_723_500_000, None, out)), "11:02:03.5");
    }

    #[test]
    fn intervals_in_every_part() {
        let read = |text: &str| interval(text.as_bytes()).unwrap();
        let whole = read("1 year 2 mons 3 days 04:05:06.789012");
        assert_eq!(whole.saturating_micros(), 37_091_106_789_012);
        assert_eq!(written(|out| whole.put_iso(out)), "P1Y2M3DT4H5M6.789012S");
        let negative = read("-1 mons -1 days -00:00:00.000001");
        assert_eq!(negative.saturating_micros(), -2_716_200_000_001);
        assert_eq!(written(|out| negative.put_iso(out)), "P0Y-1M-1DT0H0M-0.000001S");
        assert_eq!(read("178000000 years").saturating_micros(), i64::MAX);
        assert_eq!(written(|out| read("-5 years").put_iso(out)), "P-5Y0M0DT0H0M0S");
        assert_eq!(read("00:00:00"), Interval::default());
        assert_eq!(read("1000000:00:00").micros, 3_600_000_000_000_000);
        for text in ["", "1", "1 fortnight", "P1Y", "1:2:3", "00:00:00.1234567"] {
            assert!(interval(text.as_bytes()).is_err(), "{text}");
        }
    }
}
