//! From a character of a scalar's value back to its line and column in the file.
//!
//! The value is walked along the file's text: white space in the one matches white space in the other (folding,
//! indentation), escapes of quoted scalars are undone. Where they part company the answer is `None`.

use std::iter::Peekable;
use std::str::Chars;

use super::Place;

/// Line and column of the character at byte `offset` of `value`, which begins at `place`.
pub(super) fn locate(place: &Place, value: &str, offset: usize) -> Option<(u32, u32)> {
    let mut walk = Walk::new(place)?;
    match walk.peek()? {
        '|' | '>' => walk.skip_line(),
        quote @ ('"' | '\'') => {
            walk.next();
            walk.quote = Some(quote);
        }
        _ => return follow(walk, value, offset),
    }
    // A part of a text may begin with such a character itself.
    follow(walk, value, offset).or_else(|| follow(Walk::new(place)?, value, offset))
}

fn follow(mut walk: Walk<'_>, value: &str, offset: usize) -> Option<(u32, u32)> {
    let mut at = 0;
    let mut value = value.chars().peekable();
    while let Some(wanted) = value.next() {
        if wanted.is_whitespace() {
            if at == offset {
                return Some(walk.place());
            }
            at += wanted.len_utf8();
            if value.peek().is_none_or(|next| !next.is_whitespace()) {
                walk.skip_white();
            }
            continue;
        }
        walk.skip_white();
        if at >= offset {
            return Some(walk.place());
        }
        if walk.character()? != wanted {
            return None;
        }
        at += wanted.len_utf8();
    }
    (at <= offset).then(|| walk.place())
}

struct Walk<'a> {
    rest: Peekable<Chars<'a>>,
    line: u32,
    column: u32,
    quote: Option<char>,
}

impl<'a> Walk<'a> {
    fn new(place: &'a Place) -> Option<Self> {
        let mut walk = Walk { rest: place.file_text().chars().peekable(), line: 1, column: 1, quote: None };
        while (walk.line, walk.column) < (place.line, place.column) {
            walk.next()?;
        }
        Some(walk)
    }

    fn place(&self) -> (u32, u32) {
        (self.line, self.column)
    }

    fn peek(&mut self) -> Option<char> {
        self.rest.peek().copied()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.rest.next()?;
        if next == '\n' {
            self.line += 1;
            self.column = 1;
        } else {
            self.column += 1;
        }
        Some(next)
    }

    fn skip_line(&mut self) {
        while self.next().is_some_and(|c| c != '\n') {}
    }

    fn skip_white(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.next();
        }
    }

    /// The next character of the value, escapes undone.
    fn character(&mut self) -> Option<char> {
        let next = self.next()?;
        match (self.quote, next) {
            (Some('\''), '\'') => self.next(),
            (Some('"'), '\\') => {
                let escaped = self.next()?;
                let digits = match escaped {
                    'x' => 2,
                    'u' => 4,
                    'U' => 8,
                    '\n' => {
                        self.skip_white();
                        return self.character();
                    }
                    other => return Some(other),
                };
                let code: String = (0..digits).map_while(|_| self.next()).collect();
                char::from_u32(u32::from_str_radix(&code, 16).ok()?)
            }
            (_, next) => Some(next),
        }
    }
}
