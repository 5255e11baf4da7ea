//! Reads `/metrics` as strictly as its formats are written down, so that what passes here passes a scraper:
//! [Prometheus' text](https://prometheus.io/docs/instrumenting/exposition_formats/) and
//! [OpenMetrics](https://github.com/prometheus/OpenMetrics/blob/main/specification/OpenMetrics.md).

use std::collections::{BTreeMap, BTreeSet};

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    OpenMetrics,
}

/// All samples of one name: type, unit, help, and the samples in order.
#[derive(Debug, Default)]
struct Family {
    kind: String,
    unit: Option<String>,
    help: Option<String>,
    samples: Vec<Sample>,
}

#[derive(Debug)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

/// Reads a text; panics with the line that is wrong. Returns the values by name and labels, `name{a="b"}`.
#[track_caller]
pub fn read(text: &str, format: Format) -> BTreeMap<String, f64> {
    assert!(text.ends_with('\n') && !text.contains('\r'), "{text}");
    let mut lines: Vec<&str> = text.lines().collect();
    if format == Format::OpenMetrics {
        assert_eq!(lines.pop(), Some("# EOF"), "{text}");
    }
    let mut families: Vec<(String, Family)> = Vec::new();
    for line in lines {
        match line.strip_prefix("# ") {
            Some(meta) => read_meta(meta, format, &mut families),
            None => {
                let sample = read_sample(line);
                let (name, family) = families.last_mut().expect("a type before samples");
                let is_its_own = belongs(&sample.name, name, &family.kind, format);
                assert!(is_its_own, "{line} is not of {name}");
                family.samples.push(sample);
            }
        }
    }
    let names: BTreeSet<&String> = families.iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), families.len(), "a family is split: {text}");
    let mut values = BTreeMap::new();
    for (name, family) in &families {
        check_family(name, family, format);
        for sample in &family.samples {
            let labels = sample.labels.iter().map(|(k, v)| format!("{k}=\"{v}\""));
            let labels = labels.collect::<Vec<_>>().join(",");
            let key = match labels.as_str() {
                "" => sample.name.clone(),
                labels => format!("{}{{{labels}}}", sample.name),
            };
            assert_eq!(values.insert(key, sample.value), None, "twice in {text}");
        }
    }
    values
}

fn read_meta(meta: &str, format: Format, families: &mut Vec<(String, Family)>) {
    let mut words = meta.splitn(3, ' ');
    let mut word = || words.next().unwrap_or_else(|| panic!("# {meta}"));
    let (what, name, value) = (word(), word(), word());
    check_name(name);
    if families.last().is_none_or(|(last, _)| last != name) {
        families.push((name.to_string(), Family::default()));
    }
    let (_, family) = families.last_mut().expect("it was pushed");
    assert!(family.samples.is_empty(), "behind the samples: # {meta}");
    let value = value.to_string();
    match what {
        "TYPE" => {
            assert_eq!(family.kind, "", "two types: # {meta}");
            family.kind = value;
        }
        "HELP" => assert_eq!(family.help.replace(value), None, "# {meta}"),
        "UNIT" if format == Format::OpenMetrics => {
            assert!(name.ends_with(&format!("_{value}")), "# {meta}");
            assert_eq!(family.unit.replace(value), None, "# {meta}");
        }
        _ => panic!("# {meta}"),
    }
}

fn check_name(name: &str) {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_';
    assert!(name.chars().all(legal), "{name}");
    assert!(!name.starts_with(|c: char| c.is_ascii_digit()), "{name}");
}

fn read_sample(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
    let (name, labels) = match series.split_once('{') {
        None => (series, ""),
        Some((name, rest)) => (name, rest.strip_suffix('}').expect("labels end")),
    };
    check_name(name);
    let mut found = BTreeMap::new();
    for label in labels.split(',').filter(|label| !label.is_empty()) {
        let (key, value) = label.split_once('=').expect("a label has a value");
        check_name(key);
        let value = value.strip_prefix('"').and_then(|it| it.strip_suffix('"'));
        let value = value.unwrap_or_else(|| panic!("{line}"));
        assert!(!value.contains(['"', '\\']), "{line}");
        assert_eq!(found.insert(key.to_string(), value.to_string()), None);
    }
    Sample {
        name: name.to_string(),
        labels: found,
        value: value.parse().unwrap_or_else(|_| panic!("{line}")),
    }
}

/// Whether a sample of this name may be in the family.
fn belongs(sample: &str, family: &str, kind: &str, format: Format) -> bool {
    let Some(end) = sample.strip_prefix(family) else {
        return false;
    };
    match (kind, format) {
        ("counter", Format::OpenMetrics) => end == "_total",
        ("info", Format::OpenMetrics) => end == "_info",
        ("counter", Format::Text) => end.is_empty() && family.ends_with("_total"),
        ("gauge", _) => end.is_empty(),
        ("histogram", _) => ["_bucket", "_sum", "_count"].contains(&end),
        _ => false,
    }
}

fn check_family(name: &str, family: &Family, format: Format) {
    assert!(
        family.help.as_ref().is_some_and(|help| !help.is_empty()),
        "{name}"
    );
    assert!(!family.samples.is_empty(), "{name} is empty");
    let has_unit = name.ends_with("_bytes") || name.ends_with("_seconds");
    assert_eq!(
        family.unit.is_some(),
        has_unit && format == Format::OpenMetrics,
        "{name}"
    );
    for sample in &family.samples {
        let is_number = sample.value.is_finite() && sample.value >= 0.0;
        assert!(is_number, "{name} is {}", sample.value);
    }
    if family.kind != "histogram" {
        return;
    }
    let of = |end: &str| {
        let full = format!("{name}{end}");
        let samples = family.samples.iter().filter(move |it| it.name == full);
        samples.collect::<Vec<_>>()
    };
    let buckets: Vec<(f64, f64)> = of("_bucket")
        .into_iter()
        .map(|bucket| {
            let bound = bucket.labels.get("le").expect("a bucket has a bound");
            assert!(bound.contains('.') || bound == "+Inf", "{name} {bound}");
            (bound.parse().expect("a bound is a number"), bucket.value)
        })
        .collect();
    let ascending = buckets
        .windows(2)
        .all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1);
    assert!(ascending && buckets.len() > 10, "{name} {buckets:?}");
    let (last, count) = (buckets.last().expect("they are many"), of("_count"));
    assert_eq!(of("_sum").len(), 1, "{name}");
    assert_eq!((last.0, last.1), (f64::INFINITY, count[0].value), "{name}");
}
