//! What connection strings mean, as tables.
