//! Names that Avro and Kafka allow. A name that is allowed already is never touched.

/// A name with what Avro forbids in it replaced by `_`, and a digit in front preceded by `_` (as Debezium's
/// `field.name.adjustment.mode=avro`).
pub(super) fn avro_name(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    if name.starts_with(|c: char| c.is_ascii_digit()) || name.is_empty() {
        out.push('_');
    }
    out.extend(name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' }));
    out
}

/// A dotted name, adjusted part by part; empty parts vanish.
pub(super) fn avro_namespace(name: &str) -> String {
    name.split('.').filter(|part| !part.is_empty()).map(avro_name).collect::<Vec<_>>().join(".")
}

/// Adjusted names, all different: those that need no adjusting keep theirs, the others get `_` added until they
/// are alone.
pub(super) fn distinct_avro_names<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Vec<String> {
    let is_free = |name: &str, taken: &[String]| !taken.iter().any(|other| other == name);
    let kept: Vec<String> = names.clone().filter(|name| avro_name(name) == *name).map(str::to_owned).collect();
    let mut given: Vec<String> = Vec::new();
    for name in names {
        let mut adjusted = avro_name(name);
        if adjusted != name {
            while !is_free(&adjusted, &given) || !is_free(&adjusted, &kept) {
                adjusted.push('_');
            }
        }
        given.push(adjusted);
    }
    given
}

/// `<prefix>.<schema>.<table>` with what Kafka forbids in a topic replaced by `_`.
pub fn topic_name(prefix: &str, schema: &str, table: &str) -> String {
    format!("{prefix}.{schema}.{table}")
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_avro_forbids_are_adjusted_and_stay_apart() {
        assert_eq!(avro_namespace("shop.g.T Weird-Näme"), "shop.g.T_Weird_N_me");
        assert_eq!(topic_name("shop", "g", "T Weird-Näme"), "shop.g.T_Weird-N_me");
        let names = ["1digit", "a b", "a-b", "a_b", "fine", "日"];
        assert_eq!(distinct_avro_names(names.into_iter()), ["_1digit", "a_b_", "a_b__", "a_b", "fine", "_"]);
    }
}
