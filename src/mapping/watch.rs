//! Bounds of one run of an expression.
//!
//! jq is a whole language: an expression may loop forever, recurse without end, or double a text until memory is
//! gone. jaq has no bounds of its own, but it clones the context of the run at nearly every step, and the context
//! holds a [`Watch`]: each clone counts a step and looks at the clock and at how deep the stack is. Past a bound the
//! run is unwound (`resume_unwind`, caught in `Program::run`: no message, no hook, nothing shared is touched), so no
//! `try` in the expression can go on. What makes values without cloning the context (`range`, `+`, `*`) is replaced
//! by functions that charge the same account, and what nests them ever deeper is checked in loops. Every value that a
//! list takes is charged for, and so is a text before it is taken apart (`split`, `explode`, regular expressions …).
//!
//! Bounds: [`STEPS`] steps, [`TIME`], [`BYTES`] of texts and lists made, [`STACK`] of stack.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::hint::black_box;
use std::time::{Duration, Instant};

use jaq_json::Val;

use super::convert::DEEPEST;
use super::links::{Links, Wanted};

/// Steps of one run. A usual mapping takes some hundreds.
pub const STEPS: u64 = 2_000_000;
/// Time of one run.
pub const TIME: Duration = Duration::from_secs(5);
/// Bytes of texts and lists made in one run.
pub const BYTES: usize = 256 << 20;
/// Stack used by one run; a worker thread of tokio has 2 MiB.
pub const STACK: usize = 640 << 10;

/// What a run is unwound with.
pub(super) struct Exceeded(pub(super) &'static str);

/// The account of one run.
pub(super) struct Watch<'a> {
    pub(super) links: Option<&'a Links>,
    /// What was asked for and is not known.
    pub(super) needs: RefCell<Vec<Wanted>>,
    /// What was asked for and is not there.
    pub(super) waits: RefCell<Option<Wanted>>,
    steps: Cell<u64>,
    bytes: Cell<usize>,
    loops: Cell<u64>,
    started: Cell<Option<Instant>>,
    stack: usize,
}

impl<'a> Watch<'a> {
    pub(super) fn new(links: Option<&'a Links>) -> Self {
        Watch {
            links,
            needs: RefCell::default(),
            waits: RefCell::default(),
            steps: Cell::new(0),
            bytes: Cell::new(0),
            loops: Cell::new(0),
            started: Cell::new(None),
            stack: stack_address(),
        }
    }

    /// Counts a step; does not return past a bound.
    pub(super) fn step(&self) {
        let steps = self.steps.get() + 1;
        self.steps.set(steps);
        if stack_address().abs_diff(self.stack) > STACK {
            exceeded("it recurses too deep");
        }
        if steps.is_multiple_of(4096) {
            if steps > STEPS {
                exceeded("it takes too many steps; does it loop forever?");
            }
            match self.started.get() {
                None => self.started.set(Some(Instant::now())),
                Some(started) if started.elapsed() > TIME => exceeded("it takes too long; does it loop forever?"),
                Some(_) => {}
            }
        }
    }

    /// Counts bytes that are about to be made.
    pub(super) fn charge(&self, bytes: usize) {
        let bytes = self.bytes.get().saturating_add(bytes);
        self.bytes.set(bytes);
        if bytes > BYTES {
            exceeded("it makes too large values");
        }
    }

    /// Looks, now and then, whether the value that a loop carries is nested ever deeper.
    pub(super) fn turn(&self, value: &Val) {
        self.step();
        let turns = self.loops.get() + 1;
        self.loops.set(turns);
        if turns.is_multiple_of(64) && deeper_than(value, DEEPEST) {
            exceeded("it nests values too deep");
        }
    }
}

fn exceeded(why: &'static str) -> ! {
    std::panic::resume_unwind(Box::new(Exceeded(why)) as Box<dyn Any + Send>)
}

fn stack_address() -> usize {
    let here = 0u8;
    std::ptr::from_ref(black_box(&here)) as usize
}

fn deeper_than(value: &Val, depth: usize) -> bool {
    let Some(depth) = depth.checked_sub(1) else { return true };
    match value {
        Val::Arr(items) => items.iter().any(|item| deeper_than(item, depth)),
        Val::Obj(fields) => fields.values().any(|field| deeper_than(field, depth)),
        _ => false,
    }
}
