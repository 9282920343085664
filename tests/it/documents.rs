//! What documents, help and hints name is there: commands with their flags, metrics, settings.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use regex::Regex;
use tidegate::cli::Cli;
use tidegate::rest::METRICS;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: impl AsRef<Path>) -> String {
    let path = root().join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Files below `folder` whose name ends so.
fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_str().unwrap().ends_with(ending) {
                found.push(path);
            }
        }
    }
    found
}

/// The words of a command as a shell would split them, up to a pipe, a comment or a redirection.
fn words(line: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let (mut word, mut quote) = (None::<String>, None::<char>);
    for character in line.chars() {
        match (quote, character) {
            (Some(open), _) if character == open => quote = None,
            (Some(_), _) => word.get_or_insert_default().push(character),
            (None, '\'' | '"') => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (None, ' ') => words.extend(word.take()),
            (None, '|' | '#' | '>' | ';' | '&') if word.is_none() => break,
            (None, _) => word.get_or_insert_default().push(character),
        }
    }
    words.extend(word);
    words
}

/// What clap says against a command line; `None` when it is a good one.
fn refused(line: &str) -> Option<String> {
    let words = words(line);
    let asks_for_help = words.iter().any(|word| word == "--help" || word == "--version");
    match Cli::command().try_get_matches_from(words) {
        Ok(_) => None,
        Err(_) if asks_for_help => None,
        Err(error) => Some(format!("{line}\n{error}")),
    }
}

/// Command lines that a text has, each with where it stands.
fn commands() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let quoted = Regex::new(r"`(tidegate [a-z][^`…]*)`").unwrap();
    let variable = Regex::new(r"[A-Z]+=\S+ ").unwrap();
    let documents = ["README.md", "docs/configuration.md", "docs/operating.md", "ARCHITECTURE.md"];
    for document in documents {
        let text = read(document);
        let mut shell = false;
        for line in text.lines() {
            shell = if line.starts_with("```") { line == "```sh" } else { shell };
            let line = variable.replace(line, "");
            if shell && line.starts_with("tidegate ") {
                found.push((document.to_owned(), line.to_string()));
            }
            found.extend(quoted.captures_iter(&line).map(|one| (document.to_owned(), one[1].to_owned())));
        }
    }
    let demo = read("scripts/demo/demo.py");
    let (_, look_further) = demo.split_once("def look_further").expect("where the demo says how to look further");
    let line = Regex::new(r#""(tidegate [^"]+)""#).unwrap();
    found.extend(
        line.captures_iter(look_further).take(4).map(|one| ("scripts/demo/demo.py".to_owned(), one[1].to_owned())),
    );
    let compose = Regex::new(r"exec tidegate (tidegate .+)").unwrap();
    found.extend(
        compose
            .captures_iter(&read("docker-compose.yml"))
            .map(|one| ("docker-compose.yml".to_owned(), one[1].to_owned())),
    );
    let placeholder = Regex::new(r"\{[a-z_.]*\}|…").unwrap();
    let hint = Regex::new(r"'(tidegate [a-z][^']*)'").unwrap();
    for file in files("src", ".rs") {
        let name = file.strip_prefix(root()).unwrap().display().to_string();
        let text = std::fs::read_to_string(&file).unwrap();
        for line in text.lines() {
            // An example of `--help`: what it is for follows after a gap.
            if let Some(example) = line.strip_prefix("  tidegate ") {
                let example = format!("tidegate {}", example.split("   ").next().unwrap());
                found.push((name.clone(), example.replace("\\\"", "\"").trim_end_matches("\")]").to_owned()));
            }
            for one in hint.captures_iter(line) {
                found.push((name.clone(), placeholder.replace_all(&one[1], "x").into_owned()));
            }
        }
    }
    found
}

#[test]
fn every_command_that_is_named_somewhere_is_one() {
    let commands = commands();
    for (file, least) in
        [("README.md", 8), ("docs/operating.md", 6), ("scripts/demo/demo.py", 4), ("docker-compose.yml", 1)]
    {
        let seen = commands.iter().filter(|(from, _)| from == file).count();
        assert!(seen >= least, "{seen} commands were found in {file}");
    }
    let wrong: Vec<String> =
        commands.iter().filter_map(|(file, line)| Some(format!("{file}: {}", refused(line)?))).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(refused("tidegate consume t --no-such").is_some() && refused("tidegate connectors stop x").is_some());
}

#[test]
fn every_metric_is_documented_and_has_its_help() {
    let name = Regex::new(r"\btidegate_[a-z_]+[a-z]\b").unwrap();
    let in_text = |text: &str| name.find_iter(text).map(|name| name.as_str().to_owned()).collect::<BTreeSet<_>>();
    let described: BTreeSet<String> = METRICS.iter().map(|(_, name, _)| (*name).to_owned()).collect();
    let text = read("docs/operating.md");
    let documented = in_text(text.split_once("## Metrics").expect("a part on metrics").1);
    assert_eq!(documented, described, "docs/operating.md, and what src/rest/metrics.rs describes");
    let quoted = Regex::new(r#""(tidegate_[a-z_]+)""#).unwrap();
    let mut used = BTreeSet::new();
    for file in files("src", ".rs").iter().filter(|file| !file.ends_with("rest/metrics.rs")) {
        let text = std::fs::read_to_string(file).unwrap();
        used.extend(quoted.captures_iter(&text).map(|name| name[1].to_owned()));
    }
    assert_eq!(described.difference(&used).collect::<Vec<_>>(), Vec::<&String>::new(), "described, and never measured");
}

#[test]
fn every_documented_setting_is_read_somewhere() {
    let mut sources = String::new();
    for file in files("src", ".rs") {
        let text = std::fs::read_to_string(file).unwrap();
        sources.push_str(text.split("#[cfg(test)]").next().unwrap());
    }
    let span = Regex::new(r"`([^`]+)`").unwrap();
    let text = read("docs/configuration.md");
    let (mut seen, mut unread) = (0, Vec::new());
    let mut in_table = false;
    for line in text.lines() {
        in_table = (in_table || line.starts_with("| setting |")) && line.starts_with('|');
        let cell = line.split('|').nth(1).unwrap_or_default();
        if !in_table || cell.contains("---") || cell.contains("setting") {
            continue;
        }
        let mut section = String::new();
        for one in span.captures_iter(cell) {
            // `timeouts.connect`, `.request`
            let name = if one[1].starts_with('.') { format!("{section}{}", &one[1]) } else { one[1].to_owned() };
            section = name.rsplit_once('.').map_or("", |(section, _)| section).to_owned();
            if name.contains('*') || name.contains("NAME") {
                continue;
            }
            seen += 1;
            // `log.retention.bytes` is read as `retention.bytes` of the section `log`.
            let mut parts: Vec<&str> = name.split('.').collect();
            let mut read = false;
            while !parts.is_empty() && !read {
                read = sources.contains(&format!("\"{}\"", parts.join(".")));
                parts.remove(0);
            }
            if !read {
                unread.push(name);
            }
        }
    }
    assert!(seen > 120, "{seen} settings were found");
    assert_eq!(unread, Vec::<String>::new());
}
