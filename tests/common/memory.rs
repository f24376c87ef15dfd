//! How much memory a process has.

/// What it has now, in bytes.
pub fn resident_bytes(pid: u32) -> u64 {
    status(pid, "VmRSS:")
}

/// What it has now, in bytes; not what it has of its files, the program above all, which the kernel takes back at will.
pub fn anonymous_bytes(pid: u32) -> u64 {
    status(pid, "RssAnon:")
}

/// The most it ever had, in bytes.
pub fn peak_bytes(pid: u32) -> u64 {
    status(pid, "VmHWM:")
}

/// What it has in huge pages, in bytes.
pub fn huge_bytes(pid: u32) -> u64 {
    field(pid, "smaps_rollup", "AnonHugePages:")
}

fn status(pid: u32, name: &str) -> u64 {
    field(pid, "status", name)
}

fn field(pid: u32, file: &str, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}
