//! What a pull reads, and when: its settings as far as the system is concerned; the table's are the sink's.

use std::sync::Arc;

use super::incremental::Incremental;
use super::paginator::Paginator;
use super::schedule::Schedule;
use crate::config::{ConfigError, Section, Spanned};
use crate::mapping::{Compiler, Program};
use crate::systems::{RequestTemplate, System};

/// What a pull reads.
pub struct PullSettings {
    pub system: Arc<System>,
    pub object: String,
    pub(super) request: RequestTemplate,
    pub(super) paginator: Paginator,
    pub(super) records: Program,
    pub(super) incremental: Option<Incremental>,
    pub(super) schedule: Schedule,
}

impl PullSettings {
    /// Takes `request`, `params`, `headers`, `timeout`, `paginator`, `records`, `incremental`, `every`, `cron`,
    /// `timezone`.
    pub fn read(section: &mut Section, system: Arc<System>, object: String) -> Result<Self, ConfigError> {
        let compiler: &Compiler = system.compiler();
        let line: Spanned<String> = section.require("request")?;
        let mut request = RequestTemplate::from_line(&line, compiler)?.at_home(&line, &system)?;
        request.take_params(section, compiler)?;
        if let Some(body) = section.take::<Spanned<String>>("body")? {
            request.body = Some(compiler.jq(&body)?);
        }
        let paginator = Paginator::read(section.section("paginator")?, compiler)?;
        let records: Option<Spanned<String>> = section.take("records")?;
        let records = records.unwrap_or_else(|| Spanned::new(".".to_owned(), section.place().clone()));
        let records = compiler.jq(&records)?;
        let incremental =
            section.section("incremental")?.map(|inner| Incremental::read(inner, compiler)).transpose()?;
        if paginator.needs_cursor() && incremental.is_none() {
            return Err(section
                .missing("incremental")
                .hint("a `single` listing with a `limit` is asked again from its cursor"));
        }
        let schedule = Schedule::read(section)?;
        Ok(PullSettings { object, request, paginator, records, incremental, schedule, system })
    }

    /// Whether there is a cursor.
    pub fn is_incremental(&self) -> bool {
        self.incremental.is_some()
    }
}
