//! `tidegate plan`: what starting would create or change, and what is missing for it.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::output;
use super::{CliError, Global, NOT_WELL};
use crate::worker::{self, Access, Resources, World, load_file};

/// Show what would be created or changed: slot, publication, topics, subjects, tables; and what is missing
///
/// Nothing is changed. Statements that only a DBA may run are printed as one SQL script. Exit code 5 when something
/// keeps a connector from working.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tidegate plan
  tidegate plan shop
  tidegate plan --sql | psql -U postgres shop       what only the DBA may do")]
pub struct Plan {
    /// Only these connectors
    connectors: Vec<String>,
    /// Print nothing but the SQL for the DBA
    #[arg(long)]
    sql: bool,
}

impl Plan {
    pub async fn run(self, global: &Global) -> Result<ExitCode, CliError> {
        let settings = global.settings()?;
        let resources = Resources::open_for(&settings, Access::Plan).await?;
        let world = World { systems: &settings.systems, state: &settings.state };
        let mut plans = Vec::new();
        let mut well = true;
        for (path, text) in worker::read_folder(&settings.connectors)? {
            let loaded = match load_file(&path, &text, &world) {
                Ok(loaded) => loaded,
                Err(error) => {
                    well = false;
                    plans.push((path.display().to_string(), Err(error.to_string())));
                    continue;
                }
            };
            if !self.connectors.is_empty() && !self.connectors.contains(&loaded.name) {
                continue;
            }
            let planned = loaded.connector.plan(&resources.still(&loaded.name)).await;
            well &= planned.as_ref().is_ok_and(|plan| plan.problems.is_empty());
            plans.push((loaded.name, planned.map_err(|fault| fault.to_string())));
        }
        if self.connectors.is_empty() {
            well &= nothing_awaited_in_vain(&mut plans);
        }
        for wanted in &self.connectors {
            if !plans.iter().any(|(name, _)| name == wanted) {
                return Err(CliError::new(super::FAILED, format!("there is no connector '{wanted}'")));
            }
        }
        let mut sql: Vec<String> = Vec::new();
        for statement in plans.iter().filter_map(|(_, plan)| plan.as_ref().ok()).flat_map(|plan| &plan.dba_sql) {
            if !sql.contains(statement) {
                sql.push(statement.clone());
            }
        }
        if global.json() {
            let connectors: Vec<_> = plans
                .iter()
                .map(|(name, plan)| match plan {
                    Ok(plan) => json!({ "name": name, "plan": plan }),
                    Err(error) => json!({ "name": name, "error": error }),
                })
                .collect();
            output::print_json(&json!({ "connectors": connectors, "dba_sql": sql }))?;
        } else if self.sql {
            // What reads the script reads nothing else.
            for (name, planned) in &plans {
                if let Err(error) = planned {
                    output::remark(&format!("{name}: {error}"));
                }
            }
            output::print(&script(&sql))?;
        } else {
            output::print(&text(&plans, &sql))?;
        }
        Ok(if well { ExitCode::SUCCESS } else { ExitCode::from(NOT_WELL) })
    }
}

type Planned = (String, Result<crate::pipeline::Plan, String>);

/// A topic that a sink awaits and no capture here makes is a problem, unless another worker's does. False: there is one.
fn nothing_awaited_in_vain(plans: &mut [Planned]) -> bool {
    let topics = |plans: &[Planned], awaited: bool| -> Vec<String> {
        let steps = plans.iter().filter_map(|(_, plan)| plan.as_ref().ok()).flat_map(|plan| &plan.steps);
        let of = steps.filter(|step| step.what == "topic" && (step.action == "await") == awaited);
        of.map(|step| step.name.clone()).collect()
    };
    let made = topics(plans, false);
    let mut well = true;
    for (_, plan) in plans.iter_mut() {
        let Ok(plan) = plan else { continue };
        for step in plan.steps.iter().filter(|step| step.what == "topic" && step.action == "await") {
            if !made.contains(&step.name) {
                well = false;
                plan.problems.push(format!("topic {} is not there, and no capture here makes it", step.name));
            }
        }
    }
    well
}

fn text(plans: &[Planned], sql: &[String]) -> String {
    let mut text = String::new();
    for (name, plan) in plans {
        text.push_str(&format!("{name}\n"));
        match plan {
            Err(error) => text.push_str(&format!("  ! {}\n", error.replace('\n', "\n    "))),
            Ok(plan) => {
                for step in &plan.steps {
                    let mark = match step.action {
                        "create" => '+',
                        "change" => '~',
                        "drop" => '-',
                        _ => ' ',
                    };
                    text.push_str(&format!("  {mark} {} {} {}", step.action, step.what, step.name));
                    if let Some(detail) = &step.detail {
                        text.push_str(&format!("  ({detail})"));
                    }
                    text.push('\n');
                }
                for problem in &plan.problems {
                    text.push_str(&format!("  ! {}\n", problem.replace('\n', "\n    ")));
                }
            }
        }
        text.push('\n');
    }
    if !sql.is_empty() {
        text.push_str("For the DBA ('tidegate plan --sql' prints only this):\n\n");
        text.push_str(&script(sql));
    }
    text
}

fn script(sql: &[String]) -> String {
    sql.iter().map(|statement| format!("{}\n", statement.trim_end())).collect()
}
