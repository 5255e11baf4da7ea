//! stub
use std::fmt;
/// x
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// x
    Text,
    /// x
    Json,
}
/// x
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// x
    pub level: log::LevelFilter,
    /// x
    pub format: LogFormat,
}
/// x
pub struct Logfmt<'a>(pub &'a str);
impl fmt::Display for Logfmt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}
