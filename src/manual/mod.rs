//! The manual for whoever runs the relay, a module a chapter.
//!
//! Each chapter is a Markdown file beside this one, so that any forge shows it as well. `README.md` is the way in.
//! A chapter links to another one by its name in brackets, which means the file there and the module here.

/// A module for each chapter. Links by name lead to the modules: the first definition of a link counts, and those at the end of
/// the chapters lead to the files.
macro_rules! chapters {
    ($($module:ident, $name:literal, $file:literal;)+) => {
        chapters!(links: [$(concat!("[", $name, "]: crate::manual::", stringify!($module), "\n")),+]; $($module, $file;)+);
    };
    (links: $links:tt; $($module:ident, $file:literal;)+) => {
        $(chapters!(one: $links; $module, $file);)+
    };
    (one: [$($link:expr),+]; $module:ident, $file:literal) => {
        #[doc = concat!($($link),+)]
        #[doc = ""]
        #[doc = include_str!($file)]
        pub mod $module {}
    };
}

chapters! {
    _01_setup, "setup", "01_setup.md";
    _02_configuration, "configuration", "02_configuration.md";
    _03_messages, "messages", "03_messages.md";
    _04_guarantees, "guarantees", "04_guarantees.md";
    _05_operation, "operation", "05_operation.md";
    _06_commands, "commands", "06_commands.md";
    _07_metrics, "metrics", "07_metrics.md";
    _08_slots, "slots", "08_slots.md";
    _09_operators, "operators", "09_operators.md";
    _10_consuming, "consuming", "10_consuming.md";
    _11_troubleshooting, "troubleshooting", "11_troubleshooting.md";
    _12_from_go, "from_go", "12_from_go.md";
    _13_benchmarks, "benchmarks", "13_benchmarks.md";
    _14_verification, "verification", "14_verification.md";
    _15_architecture, "architecture", "15_architecture.md";
    _16_contributing, "contributing", "16_contributing.md";
    _17_changes, "changes", "17_changes.md";
}
