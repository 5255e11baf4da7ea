//! The events of the torture. All of an event follows from its id, so that the id is all that is kept of it.

use std::hash::{DefaultHasher, Hash, Hasher};

/// Which row of which transaction of which writer, and whether it was written to be rolled back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventId(u64);

/// Which an event's subject has behind the prefix.
pub const AGGREGATE_TYPES: [&str; 3] = ["account", "order", "invoice"];

const ROW_BITS: u32 = 14;
const TRANSACTION_BITS: u32 = 32;

impl EventId {
    pub fn new(writer: u8, transaction: u32, row: u16, doomed: bool) -> EventId {
        assert!(row < 1 << ROW_BITS, "a transaction has too many rows");
        let id = u64::from(writer) << TRANSACTION_BITS | u64::from(transaction);
        EventId((id << ROW_BITS | u64::from(row)) << 1 | u64::from(doomed))
    }

    /// Rolled back by its writer: nobody may ever see it.
    pub fn is_doomed(self) -> bool {
        self.0 & 1 == 1
    }

    /// Its transaction: the writer's number and the transaction's.
    pub fn transaction(self) -> (u8, u32) {
        let id = self.0 >> (1 + ROW_BITS);
        ((id >> TRANSACTION_BITS) as u8, id as u32)
    }

    /// As the `id` column has it; rows of one writer are in the order in which they were written.
    pub fn uuid(self) -> String {
        let hex = format!("{:024x}", self.0);
        format!(
            "00000000-{}-{}-{}-{}",
            &hex[0..4],
            &hex[4..8],
            &hex[8..12],
            &hex[12..24]
        )
    }

    /// Undoes [`EventId::uuid`]; `None` for what is no id of ours.
    pub fn parse(uuid: &str) -> Option<EventId> {
        let hex: String = uuid.split('-').collect();
        Some(EventId(u64::from_str_radix(&hex, 16).ok()?)).filter(|id| id.uuid() == uuid)
    }

    fn hash(self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.0.hash(&mut hasher);
        hasher.finish()
    }

    pub fn aggregate_type(self) -> &'static str {
        AGGREGATE_TYPES[(self.hash() % 3) as usize]
    }

    pub fn aggregate_id(self) -> u64 {
        self.hash() / 3 % 200
    }

    pub fn subject(self, prefix: &str) -> String {
        format!("{prefix}.{}.{}", self.aggregate_type(), self.aggregate_id())
    }

    /// Compact, and with the keys in jsonb's order (short ones first): as it is to arrive. Most are small, one in
    /// 40 has a few kilobytes, one in 400 up to 32.
    pub fn payload(self) -> String {
        let hash = self.hash();
        let size = match hash % 400 {
            0 => 4_000 + hash / 400 % 28_000,
            1..10 => 1_000 + hash / 400 % 2_000,
            _ => hash / 400 % 200,
        };
        let pad = format!("{hash:016x}<&é>").repeat(size as usize / 20);
        format!(r#"{{"n":{hash}0,"id":"{}","pad":"{pad}"}}"#, self.uuid())
    }
}
