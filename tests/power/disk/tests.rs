//! What a cut leaves, and what it may not leave.

use super::*;

const OWNER: (u32, u32) = (0, 0);

fn file(disk: &mut Disk, name: &str) -> u64 {
    let created = disk.create(ROOT, OsStr::new(name), false, 0o600, OWNER);
    created.expect("a name that is free")
}

fn content(disk: &Disk, name: &str) -> Option<Vec<u8>> {
    let inode = disk.lookup(ROOT, OsStr::new(name)).ok()?;
    Some(disk.file(inode).ok()?.live.clone())
}

/// What is there after a cut, for each of many seeds.
fn after_cuts(disk: impl Fn() -> Disk, name: &str) -> BTreeSet<Option<Vec<u8>>> {
    let cut = |seed| {
        let mut disk = disk();
        disk.cut(&mut Rng::with_seed(seed));
        content(&disk, name)
    };
    (0..500).map(cut).collect()
}

#[test]
fn what_was_synced_outlives_every_cut() {
    for rules in [Rules::EXT4, Rules::XFS, Rules::POSIX] {
        let disk = || {
            let mut disk = Disk::new(rules);
            let inode = file(&mut disk, "a");
            disk.write(inode, 0, b"synced").expect("there is room");
            disk.sync_file(inode).expect("it is a file");
            disk.sync_folder(ROOT).expect("it is a folder");
            disk
        };
        let found = after_cuts(disk, "a");
        assert_eq!(
            found,
            BTreeSet::from([Some(b"synced".to_vec())]),
            "{rules:?}"
        );
    }
}

#[test]
fn what_was_not_synced_may_be_lost_torn_or_there() {
    let before = vec![b'-'; 2 * PAGE];
    let disk = || {
        let mut disk = Disk::new(Rules::EXT4);
        let inode = file(&mut disk, "a");
        disk.write(inode, 0, &before).expect("there is room");
        disk.sync();
        disk.write(inode, 0, &vec![b'+'; 2 * PAGE])
            .expect("there is room");
        disk
    };
    let found: Vec<Vec<u8>> = after_cuts(disk, "a").into_iter().flatten().collect();
    let torn = |it: &Vec<u8>| it.contains(&b'-') && it.contains(&b'+');
    assert!(found.contains(&before));
    assert!(found.iter().any(|it| !it.contains(&b'-')));
    assert!(found.iter().any(torn));
    let halves = |it: &Vec<u8>| {
        it.chunks(512)
            .all(|unit| unit.iter().all(|b| *b == unit[0]))
    };
    assert!(found.iter().all(halves), "no unit of 512 bytes is torn");
}

#[test]
fn a_name_needs_its_folder_synced_where_there_is_no_journal() {
    let disk = |rules| {
        let mut disk = Disk::new(rules);
        let inode = file(&mut disk, "a");
        disk.write(inode, 0, b"x").expect("there is room");
        disk.sync_file(inode).expect("it is a file");
        disk
    };
    let there = Some(b"x".to_vec());
    let found = after_cuts(|| disk(Rules::EXT4), "a");
    assert_eq!(found, BTreeSet::from([there.clone()]));
    let found = after_cuts(|| disk(Rules::POSIX), "a");
    assert_eq!(found, BTreeSet::from([None, there]));
}

#[test]
fn a_rename_that_was_not_synced_leaves_the_old_or_the_new_file() {
    let disk = || {
        let mut disk = Disk::new(Rules::EXT4);
        let inode = file(&mut disk, "a");
        disk.write(inode, 0, b"old").expect("there is room");
        disk.sync();
        let inode = file(&mut disk, "b");
        disk.write(inode, 0, b"new").expect("there is room");
        let renamed = disk.rename((ROOT, OsStr::new("b")), ROOT, OsStr::new("a"));
        renamed.expect("it is there");
        disk
    };
    let found = after_cuts(disk, "a");
    let (old, new) = (Some(b"old".to_vec()), Some(b"new".to_vec()));
    assert_eq!(found, BTreeSet::from([new, old]));
}

#[test]
fn what_is_added_appears_from_the_front_on_and_has_holes_elsewhere() {
    let disk = |rules| {
        let mut disk = Disk::new(rules);
        let inode = file(&mut disk, "a");
        disk.sync();
        disk.write(inode, 0, &vec![b'+'; 3 * PAGE + 5])
            .expect("there is room");
        disk
    };
    let found = after_cuts(|| disk(Rules::EXT4), "a");
    let mut sizes: Vec<usize> = found.iter().flatten().map(Vec::len).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [0, PAGE, 2 * PAGE, 3 * PAGE, 3 * PAGE + 5]);
    assert!(found.iter().flatten().flatten().all(|byte| *byte == b'+'));
    let found = after_cuts(|| disk(Rules::XFS), "a");
    assert!(found.iter().flatten().flatten().any(|byte| *byte == 0));
}

#[test]
fn a_full_disk_refuses_what_grows_and_takes_it_when_there_is_room() {
    let mut disk = Disk::new(Rules::EXT4);
    let inode = file(&mut disk, "a");
    disk.write(inode, 0, &[1; 100]).expect("there is room");
    disk.set_limit(100);
    assert_eq!(disk.write(inode, 100, &[1]), Err(Refusal::Full));
    disk.write(inode, 0, &[2; 100]).expect("it does not grow");
    disk.remove(ROOT, OsStr::new("a"), false)
        .expect("it is there");
    assert_eq!(disk.used(), 0);
    let inode = file(&mut disk, "b");
    disk.write(inode, 0, &[1; 100])
        .expect("there is room again");
}
