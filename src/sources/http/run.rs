//! A run: one reading of a listing, from a cursor to the end, page by page; and what is kept of it between pages.
//!
//! The invariant: the cursor never passes a change that the run may not have seen. A record that changes after its
//! page was read is seen by the next run, since the cursor moves at most
//! * to the time when the listing began, by the system's own clock, where cursors are times with a zone;
//! * else to the furthest cursor that was there when the first page was read, unless that page is the whole listing;
//! * from page to page, where the listing is asked again from each page's last cursor.
//!
//! A record that is removed makes those behind it come one place earlier, and one of them could slip from a page not
//! read yet to one that is. So pages by offset overlap: where a page does not go on from what was read before, the run
//! steps back until one does. A listing that goes on from nowhere again and again has no order, and leaves the cursor
//! where it is.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fetch::Fetched;
use super::incremental::{is_zoned, no_later};
use super::page::PageRecord;
use super::paginator::{Next, Position};
use super::settings::PullSettings;
use crate::datastore::Listed;
use crate::pipeline::Fault;
use crate::twoway::order;

/// Pages of one run, at the most: a listing that has more is taken for one that never ends.
const MAX_PAGES: u64 = 1_000_000;
/// Of a page, how many records at its end are known again.
const TAIL: usize = 16;
/// Steps back that any run may take; one in ten pages comes on top.
const STEPS_BACK: u64 = 3;

/// What is kept in `tidegate.cursors`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct PullState {
    #[serde(default)]
    pub cursor: Value,
    /// The furthest cursor that a record has had: what comes later lies beyond it.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub seen: Value,
    /// When the last complete run began.
    #[serde(default)]
    pub last_run: Option<DateTime<Utc>>,
    #[serde(default)]
    pub run: Option<Run>,
}

/// A run under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Run {
    /// `$cursor`.
    pub since: Value,
    /// Of the record whose cursor `since` is: `$page.tie`.
    #[serde(default)]
    pub tie: Value,
    /// The furthest cursor seen.
    pub high: Value,
    /// The furthest cursor that was there when the first page was read.
    #[serde(default)]
    known: Value,
    pub began: DateTime<Utc>,
    /// The same by the system's clock.
    remote_began: Option<DateTime<Utc>>,
    #[serde(default)]
    pub listed: Listed,
    pub next: Position,
    pub pages: u64,
    pub records: u64,
    largest: usize,
    /// Of the last page, to notice one that comes twice.
    page_hash: Option<u64>,
    /// A place that was gone on to before, moved on now and then, to notice one that comes again.
    #[serde(default)]
    mark: Option<Position>,
    /// The last records of the page before; none where the next page does not overlap it.
    #[serde(default)]
    tail: Vec<u64>,
    #[serde(default)]
    steps_back: u64,
    /// The listing goes on from nowhere: it has no order.
    #[serde(default)]
    pub unsteady: bool,
}

/// What comes after a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    Goes,
    Ends,
}

impl Run {
    /// `high`: the cursor; `seen`: the furthest that a record has had in runs before.
    pub fn new(since: Value, high: Value, seen: &Value, listed: Listed) -> Self {
        Run {
            since,
            tie: Value::Null,
            known: further(high.clone(), seen),
            high,
            began: Utc::now(),
            remote_began: None,
            listed,
            next: Position::Start,
            pages: 0,
            records: 0,
            largest: 0,
            page_hash: None,
            mark: None,
            tail: Vec::new(),
            steps_back: 0,
            unsteady: false,
        }
    }

    /// Takes a page in, and says what comes after it. An error is a listing that gets nowhere.
    pub fn take(&mut self, settings: &PullSettings, fetched: &Fetched, records: &[PageRecord]) -> Result<Then, Fault> {
        let what = format!("page {} of {}", self.pages + 1, fetched.request.line());
        let (cursor, tie) = furthest(settings, records, &self.high)?;
        self.high = further(std::mem::take(&mut self.high), &cursor);
        if self.pages == 0 {
            self.known = further(std::mem::take(&mut self.known), &cursor);
        }
        let hashes: Vec<u64> = records.iter().map(PageRecord::hash).collect();
        let hash = hashes.iter().fold(17_u64, |all, one| all.wrapping_mul(31).wrapping_add(*one));
        let again = !records.is_empty() && self.page_hash == Some(hash);
        self.page_hash = Some(hash);
        self.pages += 1;
        self.records += records.len() as u64;
        self.largest = self.largest.max(records.len());
        let Some(response) = fetched.response() else { return Ok(Then::Ends) };
        self.remote_began = self.remote_began.or_else(|| fetched.asked_at());
        if again && !settings.paginator.needs_cursor() {
            // Beyond its end, this one gives its last page again.
            if records.len() < self.largest {
                return Ok(Then::Ends);
            }
            return Err(Fault::stop(format!(
                "{what} is the same as the page before: the system takes no notice of how pages are asked for; \
                 hint: look at `paginator` and the parameters it names"
            )));
        }
        let overlap = settings.paginator.overlap();
        if let Some(back) = self.step_back(&hashes, overlap) {
            tracing::debug!("{what} does not go on from the page before: records were removed or moved; stepping back");
            self.next = back;
            return Ok(Then::Goes);
        }
        let overlapped = if self.tail.is_empty() { 0 } else { overlap };
        let next = settings.paginator.next(
            &settings.system,
            &fetched.request,
            &self.next,
            response,
            records.len(),
            overlapped,
        );
        match next.map_err(|reason| Fault::stop(format!("{what}: {reason}")))? {
            Next::End => Ok(Then::Ends),
            Next::Page(next) => {
                let named = matches!(next, Position::Token(_) | Position::Url(_));
                if named && (next == self.next || self.mark.as_ref() == Some(&next)) || self.pages >= MAX_PAGES {
                    return Err(Fault::stop(format!(
                        "{what} leads to a page that was read before: the listing would never end"
                    )));
                }
                if named && self.pages.is_power_of_two() {
                    self.mark = Some(next.clone());
                }
                // A page of one record overlaps the next one by none.
                let overlaps = overlap > 0 && records.len() > overlap;
                self.tail = if overlaps {
                    hashes[hashes.len().saturating_sub(TAIL.max(overlap))..].to_vec()
                } else {
                    Vec::new()
                };
                self.next = next;
                Ok(Then::Goes)
            }
            Next::FromCursor => {
                // What comes before the last value of a full page in the cursor's order has been seen.
                let on = order(&cursor, &self.since).then_with(|| order(&tie, &self.tie));
                if !on.is_gt() || again {
                    return Err(Fault::stop(format!(
                        "{what} is full, and all its records share the cursor {cursor}: the listing can't go on; \
                         hint: raise the paginator's `limit`, list by pages, or let the request ask for records \
                         beyond `$page.tie` of that cursor"
                    )));
                }
                (self.since, self.tie) = (cursor, tie);
                Ok(Then::Goes)
            }
        }
    }

    /// Where to go back to, if a page by offset does not overlap what was read before.
    fn step_back(&mut self, hashes: &[u64], overlap: usize) -> Option<Position> {
        let Position::Offset(offset) = self.next else { return None };
        if offset == 0 || self.tail.is_empty() || hashes.iter().any(|hash| self.tail.contains(hash)) {
            return None;
        }
        if self.steps_back >= STEPS_BACK + self.pages / 10 {
            self.unsteady = true;
            return None;
        }
        self.steps_back += 1;
        Some(Position::Offset(offset.saturating_sub(self.largest.saturating_sub(overlap).max(1) as u64)))
    }

    /// How far the cursor may move now that the run has come so far.
    pub fn reached(&self, settings: &PullSettings) -> Value {
        if is_zoned(&self.high) {
            return no_later(self.high.clone(), self.remote_began.unwrap_or(self.began));
        }
        match settings.paginator.needs_cursor() || self.pages <= 1 || order(&self.high, &self.known).is_le() {
            true => self.high.clone(),
            false => self.known.clone(),
        }
    }
}

/// The furthest of the records' cursors, with its tie breaker.
fn furthest(settings: &PullSettings, records: &[PageRecord], reached: &Value) -> Result<(Value, Value), Fault> {
    let mut furthest = (Value::Null, Value::Null);
    let Some(incremental) = &settings.incremental else { return Ok(furthest) };
    for record in records.iter().filter(|record| record.bad.is_none()) {
        let (cursor, tie) = incremental.of(&record.record, reached).map_err(Fault::stop)?;
        if order(&cursor, &furthest.0).then_with(|| order(&tie, &furthest.1)).is_gt() {
            furthest = (cursor, tie);
        }
    }
    Ok(furthest)
}

pub(super) fn further(one: Value, other: &Value) -> Value {
    if order(other, &one).is_gt() { other.clone() } else { one }
}
