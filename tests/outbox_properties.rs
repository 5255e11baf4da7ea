//! What holds for every value a row may have: the rules of `outbox::{subject, message_id, json}` can be
//! undone, let nothing illegal through, and keep different values apart.

use jetstream_outbox::outbox::json::compact_into;
use jetstream_outbox::outbox::message_id::write_message_id;
use jetstream_outbox::outbox::percent::{MAX_LEN, decode};
use jetstream_outbox::outbox::subject::{MAX_SUBJECT_LEN, validate_prefix, write_subject};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// Any text, leaning on the characters that have a rule, and of lengths around the bound.
fn value() -> impl Strategy<Value = String> {
    let special = ".. %*> \t\r\n\0\u{1f}\u{7f}\u{80}\u{85}\u{a0}\u{2028}\u{3000}\u{feff}$2E~aé€😀";
    let special = prop::sample::select(special.chars().collect::<Vec<_>>());
    let character = || prop_oneof![3 => special.clone(), 1 => any::<char>()];
    let text =
        |len| prop::collection::vec(character(), len).prop_map(|chars| chars.into_iter().collect());
    prop_oneof![
        4 => text(0..12),
        1 => text(200..900),
        1 => (text(1..4), 300..1_500_usize).prop_map(|(text, len): (String, usize)| text.repeat(len / text.len() + 1)),
        1 => (MAX_LEN - 2..MAX_LEN + 3).prop_map(|len| "x".repeat(len)),
    ]
}

/// Two values, often alike but for little.
fn pair() -> impl Strategy<Value = (String, String)> {
    prop_oneof![
        (value(), value()),
        (value(), value(), value()).prop_map(|(a, b, c)| (format!("{a}{b}"), format!("{a}{c}"))),
        // what one value becomes, taken for a value itself
        value().prop_map(|a| (message_id(&a), a)),
        value().prop_map(|a| (subject(&a, "").replace("events.", ""), a)),
    ]
}

fn subject(aggregatetype: &str, aggregateid: &str) -> String {
    let mut out = Vec::new();
    write_subject("events", aggregatetype, aggregateid, &mut out);
    String::from_utf8(out).expect("a subject is UTF-8")
}

fn message_id(id: &str) -> String {
    let mut out = Vec::new();
    write_message_id(id, &mut out);
    String::from_utf8(out).expect("an id is UTF-8")
}

/// A value as a subject bears it.
fn encoded(value: &str) -> String {
    let subject = subject(value, "1");
    let value = subject
        .strip_prefix("events.")
        .and_then(|rest| rest.strip_suffix(".1"));
    value.expect("the values keep their place").to_string()
}

fn is_illegal(c: char) -> bool {
    matches!(c, '*' | '>' | '\u{feff}') || c.is_whitespace() || c.is_control()
}

/// Failures are kept beside the tests, and are tried first from then on.
fn config() -> ProptestConfig {
    let file = FileFailurePersistence::Direct("tests/regressions/outbox_properties.txt");
    ProptestConfig {
        failure_persistence: Some(Box::new(file)),
        ..ProptestConfig::with_cases(1_000)
    }
}

fn is_shortened(encoded: &str) -> bool {
    encoded.contains("%~")
}

/// The tokens that a value makes: each dot begins another, unless it stands first, last or behind a dot.
fn token_count(value: &str) -> usize {
    let chars: Vec<char> = value.chars().collect();
    let separates = |around: &&[char]| around[0] != '.' && around[1] == '.';
    chars.windows(3).filter(separates).count() + 1
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_subject_is_legal(aggregatetype in value(), aggregateid in value()) {
        let subject = subject(&aggregatetype, &aggregateid);
        prop_assert!(subject.starts_with("events."));
        prop_assert!(subject.len() <= MAX_SUBJECT_LEN);
        prop_assert!(!subject.contains(is_illegal));
        prop_assert!(subject.split('.').all(|token| !token.is_empty()));
        prop_assert!(subject.split('.').count() >= 3);
    }

    #[test]
    fn a_subject_can_be_undone(aggregatetype in value(), aggregateid in value()) {
        let subject = subject(&aggregatetype, &aggregateid);
        let tokens: Vec<&str> = subject.split('.').skip(1).collect();
        if !is_shortened(&subject) {
            let (first, second) = tokens.split_at(token_count(&aggregatetype));
            prop_assert_eq!(second.len(), token_count(&aggregateid));
            prop_assert_eq!(decode(&first.join(".")), Some(aggregatetype));
            prop_assert_eq!(decode(&second.join(".")), Some(aggregateid));
        } else {
            prop_assert_eq!(decode(&tokens.join(".")), None);
        }
    }

    #[test]
    fn only_what_is_too_long_is_shortened(value in value()) {
        let encoded = encoded(&value);
        prop_assert!(encoded.len() <= MAX_LEN);
        // an escape is three bytes for one
        prop_assert!(value.len() * 3 > MAX_LEN || !is_shortened(&encoded));
        prop_assert!(value.len() <= MAX_LEN || is_shortened(&encoded));
    }

    #[test]
    fn different_values_make_different_subjects_and_ids((a, b) in pair()) {
        prop_assert_eq!(a == b, encoded(&a) == encoded(&b));
        prop_assert_eq!(a == b, message_id(&a) == message_id(&b));
    }

    #[test]
    fn a_legal_value_stands_as_it_is(value in "[!-$&-)+-=?-~é€😀]{1,300}") {
        prop_assume!(value.split('.').all(|token| !token.is_empty()));
        prop_assert_eq!(encoded(&value), value.clone());
        prop_assert_eq!(message_id(&value), value);
    }

    #[test]
    fn an_id_is_a_header_value(id in value()) {
        let written = message_id(&id);
        prop_assert!(!written.is_empty() && written.len() <= MAX_LEN);
        prop_assert_eq!(written.trim(), &written);
        prop_assert!(!written.contains(|c: char| c.is_control() || (c.is_whitespace() && c != ' ')));
        prop_assert_eq!(decode(&written), (!is_shortened(&written)).then_some(id));
    }

    #[test]
    fn decoding_takes_anything(text in "[%~0-9A-Fa-f. é]{0,12}") {
        if let Some(value) = decode(&text) {
            prop_assert!(value.len() <= text.len());
        }
    }

    #[test]
    fn a_prefix_that_passes_makes_legal_subjects(prefix in value()) {
        if validate_prefix(&prefix).is_ok() {
            let mut out = Vec::new();
            write_subject(&prefix, "a", "b", &mut out);
            let subject = String::from_utf8(out).expect("a subject is UTF-8");
            prop_assert!(!subject.contains(is_illegal));
            prop_assert!(subject.split('.').all(|token| !token.is_empty()));
        }
    }
}

/// The same rule in its plainest form, a byte at a time.
fn compact_slowly(json: &[u8]) -> Vec<u8> {
    let (mut in_string, mut escaped) = (false, false);
    let mut out = Vec::new();
    for &byte in json {
        if in_string {
            in_string = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
        } else if matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
            continue;
        } else {
            in_string = byte == b'"';
        }
        out.push(byte);
    }
    out
}

fn compact(json: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    compact_into(json, &mut out);
    out
}

/// JSON text with white space wherever it may stand, of numbers, keys and escapes that a parser would change.
fn json() -> impl Strategy<Value = String> {
    let scalar = prop_oneof![
        "-?(0|[1-9][0-9]{0,15})(\\.[0-9]{1,9})?([eE][+-]?[0-9])?",
        "\"([ -!#-\\[\\]-~é\u{a0}\u{2028}]|\\\\[\"\\\\/bfnrt]|\\\\u[0-9a-cA-C][0-9a-f]{3}){0,20}\"",
        prop::sample::select(vec!["true", "false", "null"]).prop_map(str::to_string),
    ];
    let spaced = |inner: BoxedStrategy<String>| {
        ("[ \t\r\n]{0,3}", inner, "[ \t\r\n]{0,3}").prop_map(|(a, x, b)| format!("{a}{x}{b}"))
    };
    spaced(scalar.boxed()).prop_recursive(4, 40, 6, move |value| {
        let key = spaced(
            "\"[a-c \\\\/]?\""
                .prop_map(|k| k.replace('\\', "\\\\"))
                .boxed(),
        );
        let member = (key, value.clone()).prop_map(|(key, value)| format!("{key}:{value}"));
        let list = |item: BoxedStrategy<String>| {
            prop::collection::vec(item, 0..6).prop_map(|items| items.join(","))
        };
        let array = list(value.boxed()).prop_map(|items| format!("[{items}]"));
        let object = list(member.boxed()).prop_map(|members| format!("{{{members}}}"));
        spaced(prop_oneof![array, object].boxed())
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn json_keeps_its_meaning_and_every_other_byte(json in json()) {
        let compacted = compact(json.as_bytes());
        prop_assert_eq!(&compacted, &compact_slowly(json.as_bytes()));
        let before: serde_json::Value = serde_json::from_str(&json).expect("generated as JSON");
        let after: serde_json::Value = serde_json::from_slice(&compacted).expect("still JSON");
        prop_assert_eq!(before, after);
        prop_assert_eq!(&compact(&compacted), &compacted);
    }

    #[test]
    fn json_of_serde_s_own_making_comes_out_as_serde_compacts_it(json in json()) {
        let value: serde_json::Value = serde_json::from_str(&json).expect("generated as JSON");
        let pretty = serde_json::to_string_pretty(&value).expect("printable");
        prop_assert_eq!(compact(pretty.as_bytes()), value.to_string().into_bytes());
    }

    #[test]
    fn bytes_that_are_no_json_lose_white_space_at_most(bytes in prop::collection::vec(
        prop_oneof![4 => prop::sample::select(b"\"\\ \t\n\ra{}:,".to_vec()), 1 => any::<u8>()], 0..64
    )) {
        prop_assert_eq!(compact(&bytes), compact_slowly(&bytes));
    }
}
