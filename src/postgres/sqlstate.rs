//! What an error of the server means for a relay: one table of SQLSTATEs, those that a walsender can raise while it
//! connects, starts and decodes among them.
//!
//! Decoding runs more of the server than reading files: a type's output function, the conversion to the client's encoding, a
//! publication's row filter, and the catalog as it was at that time. What these raise comes again at the same place of the WAL
//! each time, since the WAL does not change.
//! Source: <https://www.postgresql.org/docs/current/errcodes-appendix.html>.

/// What to do about an error of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// It passes by itself: another session may do better, however often.
    Outage,
    /// Somebody has to change a setting, a privilege or an object.
    Configuration,
    /// A row, or a message, is the cause: while decoding it is poison, that no other session can pass either.
    Data,
    /// It may pass, or may not. While decoding, one that returns at the same place will return for ever.
    Unclear,
}

/// By the five characters. The longest entry that begins them counts.
const MEANINGS: [(&str, Meaning); 34] = {
    use Meaning::{Configuration, Data, Outage, Unclear};
    [
        // connection exception
        ("08", Outage),
        // feature not supported: a setting of the server that decoding needs
        ("0A", Configuration),
        // cardinality violation, data exception (a conversion of encodings too: 22P05, 22021), integrity constraint
        // violation: of a value, or raised by a row filter over one
        ("21", Data),
        ("22", Data),
        ("23", Data),
        // invalid transaction state; of its timeouts another session knows nothing
        ("25", Unclear),
        ("25P03", Outage),
        ("25P04", Outage),
        // invalid authorization
        ("28", Configuration),
        // SQL routine exception, external routine exception, external routine invocation exception, WITH CHECK OPTION
        // violation, PL/pgSQL: of a function that a filter or a type's output calls
        ("2F", Data),
        ("38", Data),
        ("39", Data),
        ("44", Data),
        ("P0", Data),
        // no such database, no such schema
        ("3D", Configuration),
        ("3F", Configuration),
        // transaction rollback: a conflict with something that goes on meanwhile
        ("40", Outage),
        // syntax error or access rule violation: no privilege, no such object
        ("42", Configuration),
        // insufficient resources; a disk and slots of connections become free again, but memory may never suffice for a row
        ("53", Unclear),
        ("53100", Outage),
        ("53300", Outage),
        // program limit exceeded: a row whose text is over 1 GB, a filter too deep for the stack
        ("54", Data),
        // object not in prerequisite state: slot lost, wal_level too low
        ("55000", Configuration),
        // object in use, lock not available
        ("55006", Outage),
        ("55P02", Configuration),
        ("55P03", Outage),
        ("55P04", Outage),
        // operator intervention: shutting down, starting up, terminated
        ("57", Outage),
        // the database was dropped
        ("57P04", Configuration),
        // system error; a file of the WAL that is gone
        ("58", Unclear),
        ("58P01", Configuration),
        ("58P02", Configuration),
        // configuration file error
        ("F0", Configuration),
        // internal error: also `invalid memory alloc request size`, of a row that is too large as text
        ("XX", Unclear),
    ]
};

/// What the SQLSTATE means; [`Meaning::Unclear`] where it is unknown.
pub fn meaning(code: &str) -> Meaning {
    let fits = MEANINGS.iter().filter(|(begin, _)| code.starts_with(begin));
    let longest = fits.max_by_key(|(begin, _)| begin.len());
    longest.map_or(Meaning::Unclear, |(_, meaning)| *meaning)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_has_the_meaning_of_the_longest_entry() {
        use Meaning::{Configuration, Data, Outage, Unclear};
        for (codes, expected) in [
            (
                &[
                    "08006", "57P01", "57P03", "57014", "53100", "53300", "55006", "40001", "25P03",
                ][..],
                Outage,
            ),
            (
                &[
                    "28000", "28P01", "3D000", "42501", "42704", "42601", "55000", "0A000",
                    "58P01", "57P04",
                ],
                Configuration,
            ),
            // untranslatable, not in repertoire, division by zero in a filter, row too large, raised by a function
            (
                &["22P05", "22021", "22012", "54000", "54001", "P0001"],
                Data,
            ),
            (
                &["XX000", "XX001", "53200", "58030", "", "?????", "25000"],
                Unclear,
            ),
        ] {
            for code in codes {
                assert_eq!(meaning(code), expected, "{code}");
            }
        }
    }

    #[test]
    fn no_entry_stands_twice() {
        for (index, (begin, _)) in MEANINGS.iter().enumerate() {
            let again = MEANINGS.iter().skip(index + 1);
            assert!(again.clone().all(|(other, _)| other != begin), "{begin}");
        }
    }
}
