//! Outside bytes of the replication stream: frames, pgoutput messages and COPY rows never panic, and what decodes
//! stays within what was given.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::event::Cell;
use tidegate::postgres::copy_text::RowReader;
use tidegate::postgres::frames::{next_frame, server_error};
use tidegate::postgres::pgoutput;

fn check(cells: &[Cell<'_>], within: usize) {
    let bytes: usize = cells.iter().map(|cell| if let Cell::Text(text) = cell { text.len() } else { 0 }).sum();
    assert!(bytes <= within);
}

fuzz_target!(|data: &[u8]| {
    let (mut old, mut new) = (Vec::new(), Vec::new());
    if let Ok(message) = pgoutput::decode(data, &mut old, &mut new) {
        if let pgoutput::Message::Truncate { relations, .. } = &message {
            assert!(relations.iter().count() * 4 <= data.len());
        }
        check(&old, data.len());
        check(&new, data.len());
    }
    let mut at = 0;
    while let Ok(Some((frame, length))) = next_frame(&data[at..]) {
        assert!(length > frame.body.len());
        let _ = pgoutput::decode(frame.body, &mut old, &mut new);
        let _ = server_error(frame.body, "");
        at += length;
    }
    let mut row = data.to_vec();
    let mut cells = Vec::new();
    if RowReader::default().read(&mut row, &mut cells).is_ok() {
        check(&cells, data.len());
    }
});
