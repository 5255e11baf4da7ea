//! Names that nobody else has.

use ring::rand::{SecureRandom, SystemRandom};
use std::io;

/// Letters and digits that nobody else has, and nobody can guess.
///
/// # Errors
/// The system has no random numbers.
pub fn unique() -> io::Result<String> {
    let mut random = [0; 16];
    SystemRandom::new()
        .fill(&mut random)
        .map_err(|_| io::Error::other("no random numbers"))?;
    Ok(format!("{:032x}", u128::from_ne_bytes(random)))
}
