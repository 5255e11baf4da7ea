//! README and the chapters as Markdown: their lines, headings and fenced blocks.

use std::fs;
use std::path::{Path, PathBuf};

/// One file.
pub struct Document {
    /// From the repository's root.
    pub path: PathBuf,
    pub text: String,
}

/// A fenced block.
pub struct Block<'a> {
    /// Of its first fence, from 1.
    pub line: usize,
    /// What follows the fence: the language, and `run` or `output`.
    pub info: &'a str,
    /// What is in it, without the indent of the fence.
    pub body: String,
}

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README, then the chapters in their order.
pub fn all() -> Vec<Document> {
    let mut chapters: Vec<PathBuf> = fs::read_dir(root().join("src/manual"))
        .expect("the manual")
        .map(|entry| entry.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|it| it == "md"))
        .collect();
    chapters.sort();
    assert!(chapters.len() > 10, "{chapters:?}");
    let readme = root().join("README.md");
    let paths = std::iter::once(readme).chain(chapters);
    paths.map(|path| Document::read(&path)).collect()
}

/// The chapter whose file ends in this.
pub fn chapter(name: &str) -> Document {
    let documents = all().into_iter();
    let mut found = documents.filter(|it| it.path.to_string_lossy().ends_with(name));
    found
        .next()
        .unwrap_or_else(|| panic!("there is no chapter {name}"))
}

impl Document {
    fn read(path: &Path) -> Document {
        let text = fs::read_to_string(path).expect("read a document");
        let path = path.strip_prefix(root()).expect("a path in the repository");
        Document {
            path: path.to_path_buf(),
            text,
        }
    }

    /// The fenced blocks. Panics where one has no end.
    pub fn blocks(&self) -> Vec<Block<'_>> {
        let mut blocks = Vec::new();
        let mut lines = self.text.lines().enumerate();
        while let Some((number, line)) = lines.next() {
            let Some(info) = line.trim_start().strip_prefix("```") else {
                continue;
            };
            let indent = line.len() - line.trim_start().len();
            let mut body = String::new();
            loop {
                let (_, line) = lines
                    .next()
                    .unwrap_or_else(|| panic!("{}:{number}: no end", self.path.display()));
                if line.trim() == "```" {
                    break;
                }
                body += line.get(indent..).unwrap_or("");
                body.push('\n');
            }
            blocks.push(Block {
                line: number + 1,
                info,
                body,
            });
        }
        blocks
    }

    /// The text without its fenced blocks, whose lines are empty then.
    pub fn prose(&self) -> String {
        let mut is_code = false;
        let mut prose = String::new();
        for line in self.text.lines() {
            let is_fence = line.trim_start().starts_with("```");
            is_code ^= is_fence;
            if !is_code && !is_fence {
                prose += line;
            }
            prose.push('\n');
        }
        prose
    }

    /// The anchors of its headings, as forges make them.
    pub fn anchors(&self) -> Vec<String> {
        let prose = self.prose();
        let headings = prose.lines().filter(|line| line.starts_with('#'));
        headings
            .map(|line| {
                let title = line.trim_start_matches('#').trim().to_lowercase();
                let kept = |c: &char| c.is_alphanumeric() || " -_".contains(*c);
                title
                    .chars()
                    .filter(kept)
                    .collect::<String>()
                    .replace(' ', "-")
            })
            .collect()
    }

    /// The rows of the table whose head begins with these cells, without head and rule; each a list of cells.
    pub fn table(&self, head: &str) -> Vec<Vec<String>> {
        let mut lines = self.text.lines();
        lines
            .find(|line| line.starts_with(head))
            .unwrap_or_else(|| panic!("{} has no table {head}", self.path.display()));
        let rows = lines.skip(1).take_while(|line| line.starts_with('|'));
        rows.map(|row| {
            let cells = row.trim_matches('|').split(" | ");
            cells.map(|cell| cell.trim().to_string()).collect()
        })
        .collect()
    }
}

/// What stands between backticks.
pub fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}
