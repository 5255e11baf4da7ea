//! README and the manual's chapters, against the program: their tables, their links, the commands in them, and the consumers.
#![cfg(feature = "admin")]

mod blocks;
mod consumers;
mod document;
mod links;
#[path = "../support/mod.rs"]
mod support;
mod tables;
