//! Links lead somewhere, on a forge and in rustdoc.

use crate::document::{self, Document, all, root};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// `[text](target)`, `[text][label]` and `[label]: target` of a text without code.
#[derive(Debug, Default)]
struct Links {
    targets: Vec<String>,
    labels: Vec<String>,
    definitions: BTreeMap<String, String>,
}

fn links(document: &Document) -> Links {
    let mut links = Links::default();
    for line in document.prose().lines() {
        if let Some((label, target)) = line.strip_prefix('[').and_then(|it| it.split_once("]: ")) {
            let twice = links.definitions.insert(label.into(), target.into());
            assert_eq!(twice, None, "{}: {label}", document.path.display());
            continue;
        }
        // what is code holds no link
        let text: String = line.split('`').step_by(2).collect();
        for (closing, ends, found) in [
            ("](", ')', &mut links.targets),
            ("][", ']', &mut links.labels),
        ] {
            for rest in text.split(closing).skip(1) {
                let (target, _) = rest.split_once(ends).expect("a link has an end");
                found.push(target.to_string());
            }
        }
    }
    links
}

/// The file and the anchor are there.
#[track_caller]
fn leads_somewhere(from: &Document, target: &str, documents: &[Document]) {
    if target.starts_with("https://") {
        return;
    }
    let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
    let folder = from.path.parent().expect("a file has a folder");
    let path = match file {
        "" => from.path.clone(),
        file => folder.join(file),
    };
    let at = format!("{}: {target}", from.path.display());
    assert!(root().join(&path).exists(), "{at}: no such file");
    if !anchor.is_empty() {
        let document = documents.iter().find(|it| it.path == path);
        let anchors = document
            .unwrap_or_else(|| panic!("{at}: not of ours"))
            .anchors();
        assert!(anchors.iter().any(|it| it == anchor), "{at}: {anchors:?}");
    }
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    let documents = all();
    let mut count = 0;
    for document in &documents {
        let links = links(document);
        for target in links.targets.iter().chain(links.definitions.values()) {
            leads_somewhere(document, target, &documents);
            count += 1;
        }
        let path = document.path.display();
        for label in &links.labels {
            assert!(links.definitions.contains_key(label), "{path}: [{label}]");
        }
        for label in links.definitions.keys() {
            assert!(links.labels.contains(label), "{path}: [{label}] unused");
        }
    }
    assert!(count > 50, "{count}");
}

/// A label means the same chapter in a forge, by the definition in the chapter, and in rustdoc, by that of `mod.rs`. From a
/// chapter nothing leads out of the manual, since rustdoc's pages stand elsewhere.
#[test]
fn chapters_are_linked_by_the_names_that_rustdoc_knows() {
    let module = fs::read_to_string(root().join("src/manual/mod.rs")).expect("mod.rs");
    let chapters = &all()[1..];
    for chapter in chapters {
        let path = chapter.path.display();
        let file = chapter.path.file_name().and_then(|it| it.to_str());
        let file = file.expect("UTF-8");
        let name = file.trim_end_matches(".md");
        assert!(
            module.contains(&format!("_{name}, \"{}\", \"{file}\";", &name[3..])),
            "mod.rs lacks {file}"
        );
        let links = links(chapter);
        for (label, target) in &links.definitions {
            let (_, known) = target.split_once('_').expect("NN_name.md");
            assert_eq!(*known, format!("{label}.md"), "{path}");
        }
        for target in &links.targets {
            let is_inside = target.starts_with('#') || target.starts_with("https://");
            assert!(is_inside, "{path}: {target}");
        }
    }
    let readme = &all()[0];
    let targets = links(readme).targets;
    for chapter in chapters {
        let path = chapter.path.to_string_lossy().into_owned();
        assert!(targets.contains(&path), "README does not link {path}");
    }
    assert_eq!(module.matches(".md\";").count(), chapters.len());
}

#[test]
fn readme_is_short() {
    let lines = all()[0].text.lines().count();
    assert!(lines < 350, "{lines} lines: move some into a chapter");
}

/// In rustdoc a block without a language is Rust, and would be compiled.
#[test]
fn every_block_names_its_language() {
    for document in all() {
        for block in document.blocks() {
            let language = block.info.split(' ').next().unwrap_or_default();
            assert!(
                ["sh", "sql", "text", "python", "js"].contains(&language),
                "{}:{}: {:?}",
                document.path.display(),
                block.line,
                block.info
            );
        }
    }
}

/// The paths of files that texts name in backticks.
#[test]
fn files_that_are_named_exist() {
    for document in all() {
        for word in document::quoted(&document.prose().replace('\n', " ")) {
            let is_path = ["src/", "tests/", "scripts/"]
                .iter()
                .any(|folder| word.starts_with(folder));
            if !is_path || word.contains(['*', '<', 'N']) {
                continue;
            }
            let path = word.split(' ').next().unwrap_or_default();
            assert!(
                Path::new(root()).join(path).exists(),
                "{}: {path}",
                document.path.display()
            );
        }
    }
}
