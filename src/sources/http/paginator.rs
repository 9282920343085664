//! How a listing is read page by page, and how it is noticed that it gets nowhere.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{ConfigError, Section, Spanned};
use crate::mapping::{Compiler, Program, Scope};
use crate::systems::{HttpRequest, HttpResponse, System};

/// `paginator:`
pub enum Paginator {
    /// One request has it all; with `limit` and an incremental cursor, the request is asked again from the new cursor
    /// while pages come full.
    Single {
        limit: Option<usize>,
    },
    Offset {
        limit_param: String,
        offset_param: String,
        limit: usize,
        stop: Stop,
        /// Records of a page that the next one gives again, so that it is seen to go on from there.
        overlap: usize,
    },
    PageNumber {
        page_param: String,
        limit_param: Option<String>,
        limit: Option<usize>,
        first: u64,
        stop: Stop,
    },
    /// The answer names the next page's token.
    Cursor {
        path: Program,
        param: String,
    },
    /// The answer names the next page's URL: at `path` of the body, else in the header `Link` as `rel="next"`.
    Link {
        path: Option<Program>,
    },
}

/// What ends an offset or page number listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A page without a new record: a system may give fewer than `limit` on any page.
    Empty,
    /// The first page with fewer records than `limit`: a request less, for systems that keep to the limit.
    Short,
}

crate::choices!(Stop { "empty" => Stop::Empty, "short" => Stop::Short });

/// Where a listing goes on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Position {
    #[default]
    Start,
    Offset(u64),
    Page(u64),
    Token(Value),
    /// As [`HttpRequest::path`] takes it.
    Url(String),
}

/// What comes after a page.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    End,
    Page(Position),
    /// From the cursor as it is after this page.
    FromCursor,
}

impl Paginator {
    /// The settings of `paginator:`; single without any.
    pub fn read(section: Option<Section>, compiler: &Compiler) -> Result<Self, ConfigError> {
        let Some(mut section) = section else { return Ok(Paginator::Single { limit: None }) };
        let kind: Spanned<String> = section.require("type")?;
        let paginator = match kind.as_str() {
            "single" => Paginator::Single { limit: at_least_one(&mut section)? },
            "offset" => Paginator::Offset {
                limit_param: section.or("limit_param", "limit".to_owned())?,
                offset_param: section.or("offset_param", "offset".to_owned())?,
                limit: at_least_one(&mut section)?.unwrap_or(100),
                stop: section.or("stop", Stop::Empty)?,
                overlap: section.or("overlap", 1)?,
            }
            .overlapping(&section)?,
            "page_number" => {
                let limit = at_least_one(&mut section)?;
                let limit_param: Option<String> = section.take("limit_param")?;
                if limit_param.is_some() && limit.is_none() {
                    return Err(section.missing("limit"));
                }
                let stop = section.or("stop", Stop::Empty)?;
                if stop == Stop::Short && limit.is_none() {
                    return Err(section.missing("limit"));
                }
                Paginator::PageNumber {
                    page_param: section.or("page_param", "page".to_owned())?,
                    limit_param,
                    limit,
                    first: section.or("first_page", 1)?,
                    stop,
                }
            }
            "cursor" => Paginator::Cursor {
                path: compiler.jq(&section.require("cursor_path")?)?,
                param: section.require("cursor_param")?,
            },
            "link" => Paginator::Link {
                path: section.take::<Spanned<String>>("path")?.map(|path| compiler.jq(&path)).transpose()?,
            },
            other => {
                return Err(ConfigError::new(&kind.place, format!("`{other}` is no type of paginator"))
                    .hint("one of: offset, page_number, cursor, link, single"));
            }
        };
        section.finish()?;
        Ok(paginator)
    }

    fn overlapping(self, section: &Section) -> Result<Self, ConfigError> {
        match self {
            Paginator::Offset { overlap, limit, .. } if overlap > 0 && overlap >= limit.max(2) => {
                Err(section.error("overlap", "`overlap` must be less than `limit`"))
            }
            paginator => Ok(paginator),
        }
    }

    /// Records of a page that the next one gives again.
    pub fn overlap(&self) -> usize {
        match self {
            Paginator::Offset { overlap, limit, .. } => (*overlap).min(limit.saturating_sub(1)),
            _ => 0,
        }
    }

    /// `$page`: what there is of `offset`, `page`, `token` and `url`; and `tie`, the tie breaker of the record whose
    /// cursor `$cursor` is.
    pub fn shown(&self, position: &Position, tie: &Value) -> Value {
        let (name, value) = match (self, position) {
            (_, Position::Offset(offset)) => ("offset", Value::from(*offset)),
            (_, Position::Page(page)) => ("page", Value::from(*page)),
            (_, Position::Token(token)) => ("token", token.clone()),
            (_, Position::Url(url)) => ("url", Value::from(url.as_str())),
            (Paginator::Offset { .. }, Position::Start) => ("offset", Value::from(0)),
            (Paginator::PageNumber { first, .. }, Position::Start) => ("page", Value::from(*first)),
            (_, Position::Start) => return Value::Object(Map::from_iter([("tie".to_owned(), tie.clone())])),
        };
        Value::Object(Map::from_iter([(name.to_owned(), value)]))
    }

    /// Makes `request` that of the page at `position`.
    pub fn turn_to(&self, request: &mut HttpRequest, position: &Position) {
        match (self, position) {
            (Paginator::Offset { limit_param, offset_param, limit, .. }, position) => {
                let offset = if let Position::Offset(offset) = position { *offset } else { 0 };
                set(request, limit_param, limit.to_string());
                set(request, offset_param, offset.to_string());
            }
            (Paginator::PageNumber { page_param, limit_param, limit, first, .. }, position) => {
                let page = if let Position::Page(page) = position { *page } else { *first };
                set(request, page_param, page.to_string());
                if let (Some(param), Some(limit)) = (limit_param, limit) {
                    set(request, param, limit.to_string());
                }
            }
            (Paginator::Cursor { param, .. }, Position::Token(token)) => {
                let token = token.as_str().map_or_else(|| token.to_string(), ToOwned::to_owned);
                set(request, param, token);
            }
            (Paginator::Link { .. }, Position::Url(url)) => {
                // It has the parameters in it, but for those that are secrets.
                request.path.clone_from(url);
                let masked = &request.masked.params;
                request.query.retain(|(name, _)| masked.contains(name));
            }
            _ => {}
        }
    }

    /// What comes after the page at `position`, which had `records`, of which the page before had up to `overlapped`
    /// too. An error is a listing that gets nowhere.
    pub fn next(
        &self,
        system: &System,
        request: &HttpRequest,
        position: &Position,
        response: &HttpResponse,
        records: usize,
        overlapped: usize,
    ) -> Result<Next, String> {
        let ends = |limit: Option<usize>, stop: Stop| {
            records <= overlapped || stop == Stop::Short && limit.is_some_and(|limit| records < limit)
        };
        Ok(match self {
            Paginator::Single { limit: Some(limit) } if records >= *limit => Next::FromCursor,
            Paginator::Single { .. } => Next::End,
            Paginator::Offset { limit, stop, .. } => {
                let offset = if let Position::Offset(offset) = position { *offset } else { 0 };
                if ends(Some(*limit), *stop) {
                    Next::End
                } else {
                    let again = self.overlap().min(records - 1);
                    Next::Page(Position::Offset(offset + (records - again) as u64))
                }
            }
            Paginator::PageNumber { first, limit, stop, .. } => {
                let page = if let Position::Page(page) = position { *page } else { *first };
                if ends(*limit, *stop) { Next::End } else { Next::Page(Position::Page(page + 1)) }
            }
            Paginator::Cursor { path, .. } => {
                let token = path.first(&response.body, &Scope::default());
                match token.map_err(|error| format!("`cursor_path`: {error}"))? {
                    Value::Null | Value::Bool(false) => Next::End,
                    Value::String(text) if text.is_empty() => Next::End,
                    token => Next::Page(Position::Token(token)),
                }
            }
            Paginator::Link { path } => {
                let next = match path {
                    Some(path) => match path.first(&response.body, &Scope::default()) {
                        Ok(Value::String(url)) => Some(url),
                        Ok(Value::Null | Value::Bool(false)) => None,
                        Ok(other) => return Err(format!("`path` of the paginator must give a URL, but gives {other}")),
                        Err(error) => return Err(format!("`path` of the paginator: {error}")),
                    },
                    None => response.headers_of("link").find_map(next_of_link),
                };
                match next.filter(|url| !url.is_empty()) {
                    Some(url) => Next::Page(Position::Url(system.resolve(request, &url)?)),
                    None => Next::End,
                }
            }
        })
    }

    /// True where an answer of 404 says that there is no such page.
    pub fn ends_by_404(&self, position: &Position) -> bool {
        matches!((self, position), (Paginator::PageNumber { first, .. }, Position::Page(page)) if page > first)
    }

    pub fn needs_cursor(&self) -> bool {
        matches!(self, Paginator::Single { limit: Some(_) })
    }
}

fn at_least_one(section: &mut Section) -> Result<Option<usize>, ConfigError> {
    match section.take::<usize>("limit")? {
        Some(0) => Err(section.error("limit", "`limit` must be at least 1")),
        limit => Ok(limit),
    }
}

fn set(request: &mut HttpRequest, name: &str, value: String) {
    request.query.retain(|(known, _)| known != name);
    request.query.push((name.to_owned(), value));
}

/// The target of `rel="next"` in a header `Link` (RFC 8288).
fn next_of_link(header: &str) -> Option<String> {
    let mut rest = header;
    while let Some(open) = rest.find('<') {
        let close = open + rest[open..].find('>')?;
        let target = &rest[open + 1..close];
        let (parameters, behind) = parameters_of_link(&rest[close + 1..]);
        let is_next = parameters.iter().any(|parameter| {
            parameter.split_once('=').is_some_and(|(name, value)| {
                name.trim().eq_ignore_ascii_case("rel")
                    && value.trim().trim_matches('"').split_whitespace().any(|rel| rel.eq_ignore_ascii_case("next"))
            })
        });
        if is_next {
            return Some(target.to_owned());
        }
        rest = behind;
    }
    None
}

/// The parameters of a link up to the comma that ends it, and what is behind it. In quotes neither `;` nor `,` counts.
fn parameters_of_link(text: &str) -> (Vec<&str>, &str) {
    let (mut parameters, mut begin, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (at, sign) in text.char_indices() {
        match sign {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ';' | ',' if !quoted => {
                parameters.push(&text[begin..at]);
                begin = at + 1;
                if sign == ',' {
                    return (parameters, &text[begin..]);
                }
            }
            _ => {}
        }
    }
    parameters.push(&text[begin..]);
    (parameters, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page_is_found_in_a_link_header() {
        let header = "<https://x.example/a?page=1>; rel=\"prev\", <https://x.example/a?page=3&b=1,2>; title=\"x\"; rel=\"last next\"";
        assert_eq!(next_of_link(header).as_deref(), Some("https://x.example/a?page=3&b=1,2"));
        assert_eq!(next_of_link("</a?page=2>;rel=next").as_deref(), Some("/a?page=2"));
        assert_eq!(next_of_link("</a?page=2>; rel=\"prev\""), None);
        assert_eq!(next_of_link("<broken"), None);
        let several =
            "</a?page=0>; rel=\"prev\",  </a?page=2>; title=\"a, b; rel=last\";rel=\"next\",</a?page=9>; rel=\"last\"";
        assert_eq!(next_of_link(several).as_deref(), Some("/a?page=2"));
    }
}
