//! What holds for every value a row may have: the rules of `outbox::{subject, message_id, header, json}` can be
//! undone, let nothing illegal through, and keep different values apart.

use jetstream_outbox::outbox::header::{ENCODED, Lines};
use jetstream_outbox::outbox::json::compact_into;
use jetstream_outbox::outbox::message_id::write_message_id;
use jetstream_outbox::outbox::percent::{MAX_LEN, decode};
use jetstream_outbox::outbox::subject::{MAX_SUBJECT_LEN, validate_prefix};
use jetstream_outbox::outbox::template::Template;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use std::convert::Infallible;

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

/// The subject that a template makes, whose first column has the first value, and so on.
fn subject_by(template: &Template, prefix: &str, values: &[&str]) -> (String, bool) {
    let mut slots = 0..;
    let compiled = template.compile(prefix, |_| slots.next().expect("they do not end"));
    let mut out = Vec::new();
    let Ok(plain) = compiled.write(|slot| Ok::<_, Infallible>(values[slot]), &mut out);
    (String::from_utf8(out).expect("a subject is UTF-8"), plain)
}

fn subject(aggregatetype: &str, aggregateid: &str) -> String {
    subject_by(
        &Template::default(),
        "events",
        &[aggregatetype, aggregateid],
    )
    .0
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
            let (subject, _) = subject_by(&Template::default(), &prefix, &["a", "b"]);
            prop_assert!(!subject.contains(is_illegal));
            prop_assert!(subject.split('.').all(|token| !token.is_empty()));
        }
    }
}

/// A text that may be a template.
fn template() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "{a}",
        "{b:lower}",
        "{prefix}",
        ".",
        "..",
        "x",
        "é",
        "%",
        " ",
        "{",
        "}",
        "*",
        ":",
        "{}",
        "{c d}",
    ]);
    prop::collection::vec(piece, 0..8).prop_map(|pieces| format!("{{prefix}}.{}", pieces.concat()))
}

/// The values of the headers called `X`, read back as a consumer would.
fn read_back(lines: &str) -> Vec<String> {
    let pairs: Vec<(&str, &str)> = lines
        .split("\r\n")
        .skip(1)
        .map(|line| line.split_once(": ").expect("a name and a value"))
        .collect();
    let encoded = pairs.contains(&(ENCODED, "X"));
    let values = pairs.iter().filter(|(name, _)| *name == "X");
    values
        .map(|(_, value)| match encoded {
            true if !value.is_empty() => decode(value).expect("it can be decoded"),
            _ => value.to_string(),
        })
        .collect()
}

fn header_lines(write: impl FnOnce(&mut Lines<'_>)) -> String {
    let mut out = Vec::new();
    let mut lines = Lines::new(&mut out, true, false);
    write(&mut lines);
    lines.finish().expect("the lines are few");
    String::from_utf8(out).expect("headers are UTF-8")
}

fn is_legal_block(lines: &str) -> bool {
    lines.split("\r\n").skip(1).all(|line| {
        let (name, value) = line.split_once(": ").expect("a name and a value");
        !name.is_empty()
            && name
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && byte != b':')
            && value.trim() == value
            && !value.contains(|c: char| c.is_control() || (c.is_whitespace() && c != ' '))
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_template_makes_legal_subjects(template in template(), values in prop::collection::vec(value(), 8)) {
        if let Ok(parsed) = template.parse::<Template>() {
            prop_assert_eq!(parsed.to_string(), template);
            let values: Vec<&str> = values.iter().map(String::as_str).collect();
            let (subject, plain) = subject_by(&parsed, "events", &values);
            prop_assert!(subject.starts_with("events.") && subject.len() <= MAX_SUBJECT_LEN);
            prop_assert!(!subject.contains(is_illegal));
            prop_assert!(subject.split('.').all(|token| !token.is_empty()));
            prop_assert!(!plain || !subject.contains('%'));
        }
    }

    #[test]
    fn a_subject_is_plain_when_nothing_in_it_is_encoded(aggregatetype in value(), aggregateid in value()) {
        let (subject, plain) = subject_by(&Template::default(), "events", &[&aggregatetype, &aggregateid]);
        prop_assert_eq!(plain, subject == format!("events.{aggregatetype}.{aggregateid}"));
    }

    #[test]
    fn a_header_can_be_read_back(value in value()) {
        let lines = header_lines(|lines| lines.add("X", &value).expect("it is encoded"));
        prop_assert!(is_legal_block(&lines), "{lines:?}");
        prop_assert_eq!(read_back(&lines), vec![value]);
    }

    #[test]
    fn repeated_headers_can_be_read_back(values in prop::collection::vec(value(), 0..4)) {
        let json = serde_json::json!({ "X": values, "Y": "1%" }).to_string();
        let lines = header_lines(|lines| lines.add_object(&json, |_| false).expect("an object"));
        prop_assert!(is_legal_block(&lines), "{lines:?}");
        prop_assert_eq!(read_back(&lines), values);
        prop_assert!(lines.contains("\r\nY: 1%"));
    }

    #[test]
    fn the_name_of_a_header_can_be_read_back(name in value()) {
        let json = serde_json::json!({ &name: "v" }).to_string();
        let lines = header_lines(|lines| lines.add_object(&json, |_| false).expect("an object"));
        prop_assert!(is_legal_block(&lines), "{lines:?}");
        let written = lines.strip_prefix("\r\n").and_then(|line| line.strip_suffix(": v"));
        let written = written.expect("one line");
        prop_assert_eq!(decode(written), Some(name));
        let lower = written.to_ascii_lowercase();
        prop_assert!(!lower.starts_with("nats-") && !lower.starts_with("outbox-"));
    }

    #[test]
    fn any_json_makes_legal_headers(json in json()) {
        let mut out = Vec::new();
        let mut lines = Lines::new(&mut out, true, true);
        let added = lines.add_object(&json, |_| false);
        lines.finish().expect("the lines are few");
        let lines = String::from_utf8(out).expect("headers are UTF-8");
        let is_object = json.trim_start().starts_with('{');
        prop_assert_eq!(added.is_ok(), is_object);
        prop_assert!(!is_object || is_legal_block(&lines), "{lines:?}");
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
