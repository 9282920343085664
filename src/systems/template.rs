//! The template of a request: `POST /path`, or a map of it with params, headers and a body.
//!
//! Shared by what sends to a system and what pulls from it, so that a request reads the same everywhere.

use std::time::Duration;

use reqwest::Method;
use reqwest::header::HeaderName;
use serde_json::Value;

use super::HttpRequest;
use super::answer::Masked;
use crate::config::{ConfigError, Node, Section, Spanned};
use crate::mapping::{Compiler, Escape, MapError, Program, Scope, Template, Tree};

#[derive(Clone)]
pub struct RequestTemplate {
    pub method: Method,
    /// The path as it stands in the file, for messages.
    pub text: String,
    path: Template,
    params: Option<Tree>,
    headers: Option<Tree>,
    timeout: Option<Duration>,
    /// Gives the body (`map`, or `body`); for a sink `None` means the connector's own map.
    pub body: Option<Program>,
    /// Of the response: the counterpart's external id.
    pub id: Option<Program>,
    /// Of the response: facts kept in the link.
    pub keep: Option<Program>,
    /// Of the response: the record, as pulls of the object list it.
    pub record: Option<Program>,
    /// Of the response: the record's version, as pulls of the object tell it.
    pub version: Option<Program>,
}

impl RequestTemplate {
    /// `POST /path`, or a map with `request`, `params`, `headers`, `map`, `id`, `keep`, `record`, `version`, `timeout`.
    pub fn read(node: &Node, compiler: &Compiler) -> Result<Self, ConfigError> {
        if node.is_map() {
            let mut section = Section::new(node.clone(), "request")?;
            let request = Self::from_section(&mut section, compiler)?;
            section.finish()?;
            return Ok(request);
        }
        Self::from_line(&node.text("request")?, compiler)
    }

    /// Takes the settings of a request out of a section that has others too: `request` must be there, `params`,
    /// `headers`, `map` or `body`, `id`, `keep`, `record`, `version` and `timeout` may.
    pub fn from_section(section: &mut Section, compiler: &Compiler) -> Result<Self, ConfigError> {
        let line: Spanned<String> = section.require("request")?;
        let mut request = Self::from_line(&line, compiler)?;
        request.take_params(section, compiler)?;
        request.take_body(section, compiler)?;
        let mut program = |name: &str| -> Result<Option<Program>, ConfigError> {
            section.take::<Spanned<String>>(name)?.map(|text| compiler.jq(&text)).transpose()
        };
        request.id = program("id")?;
        request.keep = program("keep")?;
        request.record = program("record")?;
        request.version = program("version")?;
        Ok(request)
    }

    /// Refuses an address that is not the system's; one that is only known when it is rendered is refused then.
    pub fn at_home(self, line: &Spanned<String>, system: &super::System) -> Result<Self, ConfigError> {
        let origin = self
            .text
            .split_once("://")
            .map(|(scheme, rest)| format!("{scheme}://{}", rest.split(['/', '?', '#']).next().unwrap_or_default()));
        match origin.filter(|origin| !origin.contains("{{")) {
            Some(origin) if !system.is_at(&origin) => {
                Err(ConfigError::new(&line.place, format!("`{origin}` is not where system `{}` is", system.name()))
                    .hint("give the path below the system's `base_url`; another address is another system"))
            }
            _ => Ok(self),
        }
    }

    /// Takes only `params`, `headers` and `timeout`.
    pub fn take_params(&mut self, section: &mut Section, compiler: &Compiler) -> Result<(), ConfigError> {
        self.params = section.node("params")?.map(|node| compiler.tree(&node)).transpose()?;
        self.headers = section.node("headers")?.map(|node| header_tree(&node, compiler)).transpose()?;
        self.timeout = section.take("timeout")?;
        Ok(())
    }

    /// Takes only `map` or `body`.
    pub fn take_body(&mut self, section: &mut Section, compiler: &Compiler) -> Result<(), ConfigError> {
        let map: Option<Spanned<String>> = section.take("map")?;
        let body: Option<Spanned<String>> = section.take("body")?;
        if let (Some(_), Some(body)) = (&map, &body) {
            return Err(ConfigError::new(&body.place, "`map` and `body` are one setting; keep one of them"));
        }
        self.body = map.or(body).map(|text| compiler.jq(&text)).transpose()?;
        Ok(())
    }

    /// A request whose answer is only looked at for its status (a probe): `request`, `params`, `headers`, `map` or
    /// `body`, and `timeout`.
    pub fn read_plain(node: &Node, compiler: &Compiler) -> Result<Self, ConfigError> {
        if !node.is_map() {
            return Self::from_line(&node.text("request")?, compiler);
        }
        let mut section = Section::new(node.clone(), "request")?;
        let mut request = Self::from_line(&section.require("request")?, compiler)?;
        request.take_params(&mut section, compiler)?;
        request.take_body(&mut section, compiler)?;
        section.finish()?;
        Ok(request)
    }

    /// `POST /path?query`: the method may be left out where it is GET.
    pub fn from_line(line: &Spanned<String>, compiler: &Compiler) -> Result<Self, ConfigError> {
        let text = line.value.trim();
        let (method, path) = match text.split_once(char::is_whitespace) {
            Some((method, path)) if !text.starts_with('/') => (method, path.trim_start()),
            _ => ("GET", text),
        };
        let example = "a request is a method and a path below the system's base_url: `POST /orders/{{ .id }}`";
        let wrong = |message: String| ConfigError::new(&line.place, message).hint(example);
        let method = match Method::from_bytes(method.as_bytes()) {
            Ok(known) if KNOWN_METHODS.contains(&known.as_str()) => known,
            _ => return Err(wrong(format!("`{method}` is no HTTP method"))),
        };
        if !(path.starts_with('/') || path.starts_with("http://") || path.starts_with("https://")) {
            return Err(wrong(format!("the path `{path}` must begin with `/`")));
        }
        let end = line.value.trim_end().len();
        let path_text = line.part(end - path.len()..end);
        Ok(RequestTemplate {
            method,
            text: path.to_owned(),
            path: compiler.template(&path_text, Escape::Path)?,
            params: None,
            headers: None,
            timeout: None,
            body: None,
            id: None,
            keep: None,
            record: None,
            version: None,
        })
    }

    /// The request for `input`. Its body is what [`RequestTemplate::body`] gives; without one it has none.
    pub fn render(&self, input: &Value, scope: &Scope<'_>) -> Result<HttpRequest, MapError> {
        let pairs = |tree: &Option<Tree>| match tree {
            Some(tree) => tree.render(input, scope),
            None => Ok(Vec::new()),
        };
        Ok(HttpRequest {
            method: self.method.clone(),
            path: self.path.render(input, scope)?,
            query: pairs(&self.params)?,
            headers: pairs(&self.headers)?,
            body: self.body.as_ref().map(|body| body.first(input, scope)).transpose()?,
            timeout: self.timeout,
            purpose: "request",
            masked: Masked {
                path: self.path.masked(),
                body: self.body.as_ref().is_some_and(Program::masked),
                params: self.params.as_ref().map(Tree::masked_names).unwrap_or_default(),
                headers: self.headers.as_ref().map(Tree::masked_names).unwrap_or_default(),
            },
        })
    }
}

/// A free map of headers.
pub(super) fn header_tree(node: &Node, compiler: &Compiler) -> Result<Tree, ConfigError> {
    for (name, _) in node.map("headers")? {
        if HeaderName::try_from(name.as_str()).is_err() {
            return Err(ConfigError::new(&name.place, format!("`{}` is no name of a header", name.value)));
        }
    }
    compiler.tree(node)
}

const KNOWN_METHODS: [&str; 6] = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"];
