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

fn status(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}
