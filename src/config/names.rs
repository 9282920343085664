//! Which known name was meant.

/// The known name that is nearest to `given`, when it is near enough to be a slip of the pen.
pub(crate) fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |name: &str| name.chars().filter(|c| c.is_alphanumeric()).collect::<String>().to_lowercase();
    let given = plain(given);
    let mut best: Option<(usize, &str)> = None;
    for name in known {
        let candidate = plain(name);
        let distance = strsim::damerau_levenshtein(&given, &candidate);
        let allowed = match given.chars().count().min(candidate.chars().count()) {
            0..=3 => 1,
            4..=7 => 2,
            _ => 3,
        };
        let ends =
            candidate.len() > 3 && given.len() > 3 && (given.ends_with(&candidate) || candidate.ends_with(&given));
        let distance = if ends { distance.min(3) } else { distance };
        if (distance <= allowed || ends) && best.is_none_or(|(least, _)| distance < least) {
            best = Some((distance, name));
        }
    }
    best.map(|(_, name)| name)
}
