//! Imports point one way: a module names only modules of the layers below its own. And no module is named for nothing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// From the bottom up.
const LAYERS: [&[&str]; 11] = [
    &["config", "event"],
    &["postgres", "avro", "mapping"],
    &["log"],
    &["registry"], // decodes events from records of the log
    &["datastore", "systems", "twoway"],
    &["pipeline"],
    &["sources"],
    &["sinks"], // take the batches that their sources yield
    &["worker"],
    &["rest"],
    &["cli"], // `run` serves HTTP, the other commands ask it
];

const NAMELESS: [&str; 6] = ["utils", "util", "common", "helpers", "types", "misc"];

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

fn may_use(module: &str, used: &str) -> bool {
    module == used || layer(used) < layer(module)
}

fn sources() -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

/// The first name of every path that starts at the crate: `crate::log::Log` is `log`; of a group,
/// `crate::{event::Batch, log}`, every member's first.
fn modules_named(text: &str) -> BTreeSet<String> {
    let code = text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n");
    let mut named = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => drop(named.insert(first_name(rest))),
            Some(group) => {
                let (mut depth, mut start) = (0, true);
                for (at, character) in group.char_indices() {
                    match character {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => start = true,
                        character if start && !character.is_whitespace() => {
                            named.insert(first_name(&group[at..]));
                            start = false;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    named
}

fn first_name(path: &str) -> String {
    path.chars().take_while(|character| character.is_alphanumeric() || *character == '_').collect()
}

#[test]
fn imports_point_one_way() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    for file in sources() {
        let inside = file.strip_prefix(&root).unwrap();
        let module = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        if ["lib", "main"].contains(&module) {
            continue;
        }
        if layer(module).is_none() {
            wrong.push(format!("src/{}: module {module} is in no layer of this test", inside.display()));
        }
        for used in modules_named(&std::fs::read_to_string(&file).unwrap()) {
            if layer(&used).is_some() && !may_use(module, &used) {
                wrong.push(format!("src/{}: {module} must not know {used}", inside.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "imports against the direction:\n{}", wrong.join("\n"));
}

#[test]
fn every_module_is_named_for_what_it_holds() {
    let nameless =
        |file: &PathBuf| file.iter().any(|part| NAMELESS.contains(&part.to_str().unwrap().trim_end_matches(".rs")));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found: Vec<_> =
        sources().iter().map(|file| file.strip_prefix(root).unwrap().to_owned()).filter(nameless).collect();
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn a_path_and_a_group_are_both_seen() {
    let text = "use crate::event::Batch;\nuse crate::{\n    log::{self, Log},\n    worker,\n}; // crate::cli\nfn f() -> crate::rest::X {}";
    assert_eq!(modules_named(text), ["event", "log", "rest", "worker"].map(String::from).into());
    assert!(
        may_use("worker", "log")
            && !may_use("log", "worker")
            && may_use("sinks", "sources")
            && !may_use("sources", "sinks")
    );
}
