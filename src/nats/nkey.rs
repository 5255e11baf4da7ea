//! A user's nkey: the seed as it stands in a file, the public key as a server has it, and signatures.
//!
//! An nkey is base32 (RFC 4648, without padding) of a prefix that names its kind, the Ed25519 key, and a CRC-16
//! (<https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_intro/nkey_auth>, and the `nkeys` of other
//! clients for the bits). Signing is *ring*'s.

use ring::signature::{Ed25519KeyPair, KeyPair};

const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
/// Of a seed, which begins with `S`.
const SEED: u8 = 18 << 3;
/// Of a user, `U`.
const USER: u8 = 20 << 3;
/// Two bytes of prefix, the seed, and its checksum.
const SEED_BYTES: usize = 2 + 32 + 2;
/// The same in base32.
const SEED_LETTERS: usize = (SEED_BYTES * 8).div_ceil(5);

/// What a user signs with.
pub struct Nkey(Ed25519KeyPair);

impl Nkey {
    /// Reads `SU…`. `None`: it is no seed of a user, or was not copied whole.
    pub fn from_seed(text: &str) -> Option<Nkey> {
        if text.len() != SEED_LETTERS {
            return None;
        }
        let bytes: [u8; SEED_BYTES] = decode(text)?.try_into().ok()?;
        let (checked, checksum) = bytes.split_last_chunk()?;
        let ([first, second], seed) = checked.split_first_chunk()?;
        // the kind is spread over two bytes, so that each prefix is a letter
        let kind = (first & 0b111) << 5 | second >> 3;
        let is_users = first & !0b111 == SEED && kind == USER;
        (is_users && crc16(checked) == u16::from_le_bytes(*checksum))
            .then(|| Ed25519KeyPair::from_seed_unchecked(seed).ok())?
            .map(Nkey)
    }

    /// `U…`
    pub fn public_key(&self) -> String {
        let mut bytes = vec![USER];
        bytes.extend_from_slice(self.0.public_key().as_ref());
        bytes.extend_from_slice(&crc16(&bytes).to_le_bytes());
        encode(&bytes)
    }

    /// The signature of a server's nonce.
    pub fn sign(&self, nonce: &[u8]) -> Vec<u8> {
        self.0.sign(nonce).as_ref().into()
    }
}

/// `None` for what is no base32. Bits that fill no byte are left out.
fn decode(text: &str) -> Option<Vec<u8>> {
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0_u32, 0);
    for letter in text.bytes() {
        let value = ALPHABET.iter().position(|&known| known == letter)?;
        // 5 bits of value, and 7 at most before them
        bits = bits << 5 | value as u32;
        count += 5;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(bytes)
}

fn encode(bytes: &[u8]) -> String {
    let (mut text, mut bits, mut count) = (String::new(), 0_u32, 0);
    let mut push = |value: u32| {
        let letter = ALPHABET.get(value as usize & 31);
        text.extend(letter.map(|&letter| char::from(letter)));
    };
    for &byte in bytes {
        bits = bits << 8 | u32::from(byte);
        count += 8;
        while count >= 5 {
            count -= 5;
            push(bits >> count);
            bits &= (1 << count) - 1;
        }
    }
    if count > 0 {
        push(bits << (5 - count));
    }
    text
}

/// CRC-16/XMODEM.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, &byte| {
        (0..8).fold(crc ^ u16::from(byte) << 8, |crc: u16, _| {
            crc << 1 ^ if crc & 0x8000 == 0 { 0 } else { 0x1021 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_signatures_are_those_of_other_clients() {
        for _ in 0..100 {
            let theirs = nkeys::KeyPair::new_user();
            let ours = Nkey::from_seed(&theirs.seed().unwrap()).unwrap();
            assert_eq!(ours.public_key(), theirs.public_key());
            theirs.verify(b"nonce", &ours.sign(b"nonce")).unwrap();
        }
    }

    #[test]
    fn what_is_no_seed_of_a_user_is_refused() {
        let seed = nkeys::KeyPair::new_user().seed().unwrap();
        for end in 0..seed.len() {
            assert!(Nkey::from_seed(&seed[..end]).is_none(), "{end}");
        }
        let other = |letter: &str| if letter == "A" { "B" } else { "A" };
        for at in 0..seed.len() - 1 {
            let mut wrong = seed.clone();
            wrong.replace_range(at..=at, other(&seed[at..=at]));
            assert!(Nkey::from_seed(&wrong).is_none(), "{at}");
        }
        for other in [
            nkeys::KeyPair::new_account(),
            nkeys::KeyPair::new_operator(),
        ] {
            assert!(Nkey::from_seed(&other.seed().unwrap()).is_none());
        }
        for text in [
            "",
            "SU",
            "su",
            "SUÄ",
            "=",
            &seed.to_lowercase(),
            &format!("{seed}A"),
        ] {
            assert!(Nkey::from_seed(text).is_none(), "{text}");
        }
    }
}
