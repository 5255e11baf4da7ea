//! Disks that fill, and have room again.
