//! Decoding Avro from anyone: whatever the bytes, whatever the schema, the answer is a value or an error.
//!
//! `cargo +nightly fuzz run avro_decode`. The first byte chooses one of Debezium's golden schemas; 255 says that a
//! schema follows, up to the first NUL.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tidegate::avro::{Decoder, split_wire};

static GOLDEN: LazyLock<Vec<Decoder>> = LazyLock::new(|| {
    let schemas: serde_json::Value =
        serde_json::from_str(include_str!("../../tests/golden/defaults/schemas.json")).expect("the golden schemas");
    let texts = schemas.as_object().into_iter().flatten().filter_map(|(_, schema)| schema["schema_text"].as_str());
    texts.filter_map(|text| Decoder::compile(text).ok()).collect()
});

fn decode(decoder: &Decoder, body: &[u8]) {
    let (friendly, raw) = (decoder.decode(body), decoder.decode_raw(body));
    // A friendly form may refuse what raw still shows (a decimal out of all proportion), never the other way.
    assert!(raw.is_ok() || friendly.is_err());
    if let Ok(raw) = raw {
        decoder.friendly_from_raw(raw);
    }
}

fuzz_target!(|data: &[u8]| {
    let _ = split_wire(data);
    match data.split_first() {
        Some((255, rest)) => {
            let end = rest.iter().position(|&byte| byte == 0).unwrap_or(rest.len());
            let (schema, body) = rest.split_at(end);
            if let Ok(decoder) = Decoder::compile(&String::from_utf8_lossy(schema)) {
                decode(&decoder, body.get(1..).unwrap_or_default());
            }
        }
        Some((&choice, body)) => decode(&GOLDEN[usize::from(choice) % GOLDEN.len()], body),
        None => {}
    }
});
