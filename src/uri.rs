//! Percent-encoding as in RFC 3986.

/// What `text` stands for; `None`: a `%` without two hexadecimal digits, or what is not UTF-8.
pub(crate) fn percent_decode(text: &str) -> Option<String> {
    let nibble = |byte: u8| char::from(byte).to_digit(16);
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let (high, low) = (nibble(bytes.next()?)?, nibble(bytes.next()?)?);
                u8::try_from(high << 4 | low).ok()?
            }
            plain => plain,
        });
    }
    String::from_utf8(decoded).ok()
}
