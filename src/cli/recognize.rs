//! What a file is, by its content: a raw disk, an image that `qemu-img` converts, or neither. Pure: bytes in, kind out.
//!
//! File systems, partition tables, ISO and LUKS are contents of raw disks. What is no disk at all, such as a compressed file
//! or an archive, would be served byte for byte without an error, and no guest would find its data.

/// How many bytes from the start of a file are looked at.
pub(super) const HEAD_BYTES: usize = 512;
/// How many bytes from the end of a file are looked at: the length of a trailer.
pub(super) const TAIL_BYTES: usize = 512;

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A disk as it is, or nothing that is known.
    Raw,
    /// An image in another format, by the name that `qemu-img` has for it.
    Image(&'static str),
    /// No disk.
    Foreign {
        /// With its article.
        what: &'static str,
        /// How its disk can be had.
        remedy: &'static str,
    },
}

/// Where a signature stands in the head, its bytes, and what it says.
type Signature = (usize, &'static [u8], Kind);

const fn foreign(what: &'static str, remedy: &'static str) -> Kind {
    Kind::Foreign { what, remedy }
}

const ARCHIVE: &str = "unpack it and import the disk image in it";
const RESTORE: &str = "restore it with the program that wrote it, and import the disk";

const IMAGES: &[Signature] = &[
    (0, b"QFI\xfb\0\0\0\x01", Kind::Image("qcow")),
    (0, b"QFI\xfb", Kind::Image("qcow2")),
    (0, b"KDMV", Kind::Image("vmdk")),
    (0, b"COWD", Kind::Image("vmdk")),
    (0, b"# Disk Descripto", Kind::Image("vmdk")),
    (0, b"vhdxfile", Kind::Image("vhdx")),
    (0, b"conectix", Kind::Image("vpc")),
    (64, b"\x7f\x10\xda\xbe", Kind::Image("vdi")),
    (0, b"QED\0", Kind::Image("qed")),
    (0, b"WithoutFreeSpace", Kind::Image("parallels")),
    (0, b"WithouFreSpacExt", Kind::Image("parallels")),
    (0, b"Bochs Virtual HD Image", Kind::Image("bochs")),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", Kind::Image("cloop")),
];

const COMPRESSED: &[Signature] = &[
    (0, b"\x1f\x8b\x08", foreign("a gzip file", "unpack it with `gzip -dc` and import what that writes")),
    (0, b"\x1f\x9d", foreign("a compress (.Z) file", "unpack it with `gzip -dc` and import what that writes")),
    (0, b"\xfd7zXZ\0", foreign("an xz file", "unpack it with `xz -dc` and import what that writes")),
    (0, b"\x28\xb5\x2f\xfd", foreign("a zstd file", "unpack it with `zstd -dc` and import what that writes")),
    (0, b"\x04\x22\x4d\x18", foreign("an lz4 file", "unpack it with `lz4 -dc` and import what that writes")),
    (0, b"\x02\x21\x4c\x18", foreign("an lz4 file", "unpack it with `lz4 -dc` and import what that writes")),
    (0, b"LZIP\x01", foreign("an lzip file", "unpack it with `lzip -dc` and import what that writes")),
    (0, b"LRZI", foreign("an lrzip file", "unpack it with `lrunzip` and import what that writes")),
    (0, b"\x89LZO\0\r\n\x1a\n", foreign("an lzop file", "unpack it with `lzop -dc` and import what that writes")),
    (0, b"\xff\x06\0\0sNaPpY", foreign("a snappy file", "unpack it and import what comes out")),
    (0, b"Salted__", foreign("a file encrypted with openssl", "decrypt it and import what comes out")),
    (0, b"age-encryption.org/", foreign("a file encrypted with age", "decrypt it and import what comes out")),
];

const ARCHIVES: &[Signature] = &[
    (0, b"PK\x03\x04", foreign("a zip archive", ARCHIVE)),
    (0, b"PK\x05\x06", foreign("a zip archive", ARCHIVE)),
    (0, b"PK\x07\x08", foreign("a zip archive", ARCHIVE)),
    (0, b"7z\xbc\xaf\x27\x1c", foreign("a 7z archive", ARCHIVE)),
    (0, b"Rar!\x1a\x07", foreign("a rar archive", ARCHIVE)),
    (257, b"ustar", foreign("a tar archive (such as an OVA)", ARCHIVE)),
    (0, b"070701", foreign("a cpio archive", ARCHIVE)),
    (0, b"070702", foreign("a cpio archive", ARCHIVE)),
    (0, b"070707", foreign("a cpio archive", ARCHIVE)),
    (0, b"!<arch>\n", foreign("an ar archive", ARCHIVE)),
    (0, b"MSCF\0\0\0\0", foreign("a cabinet archive", ARCHIVE)),
    (0, b"xar!", foreign("a xar archive", ARCHIVE)),
    (0, b"VMA\0", foreign("a Proxmox backup (VMA)", "unpack it with `vma extract` and import the disk in it")),
];

const BACKUPS: &[Signature] = &[
    (
        0,
        b"\x3a\xff\x26\xed",
        foreign("an Android sparse image", "convert it with `simg2img` and import what comes out"),
    ),
    (
        0,
        b"MSWIM\0\0\0",
        foreign("a Windows image (WIM)", "it holds files, not a disk: apply it to one, and import that"),
    ),
    (
        0,
        b"\xbe\xba\xfe\xca\0\0\0\0",
        foreign("an extent of a vmdk", "import its descriptor, the small .vmdk beside it"),
    ),
    (0, b"MComprHD", foreign("a CHD image", "unpack it with `chdman` and import what comes out")),
    (0, b"EVF\x09\x0d\x0a\xff\0", foreign("an EnCase image", "convert it with `ewfexport` and import what comes out")),
    (0, b"EVF2\r\n\x81\0", foreign("an EnCase image", "convert it with `ewfexport` and import what comes out")),
    (0, b"AFF10\r\n\0", foreign("an AFF image", RESTORE)),
    (0, b"partclone-image", foreign("a partclone image", RESTORE)),
    (0, b"PaRtImAgE-VoLuMe", foreign("a partimage file", RESTORE)),
    (0, b"\0ntfsclone-image", foreign("an ntfsclone image", RESTORE)),
    (0, b"FsArCh_0", foreign("an FSArchiver archive", RESTORE)),
    (0, b"CISO", foreign("a compressed ISO", "unpack it and import what comes out")),
    (0, b"IsZ!", foreign("a compressed ISO", "unpack it and import what comes out")),
    (
        0,
        b"version https://git-lfs.",
        foreign("a pointer of Git LFS", "fetch the file that it stands for with `git lfs pull`"),
    ),
    (0, b"<?xml", foreign("an XML file (such as an OVF)", "import the disk that it describes")),
];

/// What a file is that begins and ends so; both may be shorter than is looked at, or overlap.
pub(super) fn recognize(head: &[u8], tail: &[u8]) -> Kind {
    let signed = |(at, magic, _): &&Signature| head.get(*at..).is_some_and(|rest| rest.starts_with(magic));
    let known = [IMAGES, COMPRESSED, ARCHIVES, BACKUPS].into_iter().flatten().find(signed).map(|(_, _, kind)| *kind);
    known.or_else(|| structured(head)).or_else(|| trailed(tail)).unwrap_or(Kind::Raw)
}

/// Signatures that are more than bytes in a row.
fn structured(head: &[u8]) -> Option<Kind> {
    if let [b'B', b'Z', b'h', b'1'..=b'9', rest @ ..] = head
        && (rest.starts_with(b"\x31\x41\x59\x26\x53\x59") || rest.starts_with(b"\x17\x72\x45\x38\x50\x90"))
    {
        return Some(foreign("a bzip2 file", "unpack it with `bzip2 -dc` and import what that writes"));
    }
    // A frame to be skipped, with which parallel compressors begin.
    if let [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] = head {
        return Some(foreign("a zstd or lz4 file", "unpack it with `zstd -dc` and import what that writes"));
    }
    // Without a signature: the usual properties, a dictionary's size, and no length.
    if let [0x5d, 0, 0, _, _, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, ..] = head {
        return Some(foreign("an lzma file", "unpack it with `xz -dc` and import what that writes"));
    }
    let text = head.trim_ascii_start();
    let html = [&b"<!doctype html"[..], b"<html"]
        .iter()
        .any(|tag| text.get(..tag.len()).is_some_and(|start| start.eq_ignore_ascii_case(tag)));
    html.then(|| foreign("a web page", "its download went wrong: fetch the image again"))
}

/// Formats that are told by the last sector alone: what is before it may be a disk as it is.
fn trailed(tail: &[u8]) -> Option<Kind> {
    let footer = tail.last_chunk::<TAIL_BYTES>()?;
    if footer.starts_with(b"koly\0\0\0\x04\0\0\x02\0") {
        return Some(Kind::Image("dmg"));
    }
    // Its checksum tells the footer of a fixed VHD from a sector that begins alike.
    let (checksum, counted) = (footer[64..68].iter(), footer[..64].iter().chain(&footer[68..]));
    let sum = counted.fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    let signed = footer.starts_with(b"conectix") && checksum.eq(&(!sum).to_be_bytes());
    signed.then_some(Kind::Image("vpc"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(head: &[u8]) -> &'static str {
        match recognize(head, &[]) {
            Kind::Raw => "raw",
            Kind::Image(format) => format,
            Kind::Foreign { what, .. } => what,
        }
    }

    #[test]
    fn each_signature_is_recognised_where_it_stands_and_nowhere_else() {
        for (at, magic, kind) in [IMAGES, COMPRESSED, ARCHIVES, BACKUPS].into_iter().flatten() {
            let mut head = vec![0; HEAD_BYTES];
            assert!(at + magic.len() <= HEAD_BYTES);
            head[*at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(recognize(&head, &[]), *kind);
            assert_eq!(recognize(&head[..at + magic.len()], &[]), *kind, "a file that ends there");
            assert_ne!(recognize(&head[..at + magic.len() - 1], &[]), *kind, "cut short");
            head.insert(0, 0);
            assert_eq!(recognize(&head, &[]), Kind::Raw, "{kind:?}, a byte later");
        }
    }

    #[test]
    fn signatures_with_a_structure_are_recognised_by_all_of_it() {
        for (head, name) in [
            (&b"BZh91AY&SY"[..], "a bzip2 file"),
            (b"BZh1\x17\x72\x45\x38\x50\x90", "a bzip2 file"),
            (b"BZh01AY&SY", "raw"),
            (b"BZh9", "raw"),
            (b"\x50\x2a\x4d\x18\x04", "a zstd or lz4 file"),
            (b"\x60\x2a\x4d\x18\x04", "raw"),
            (b"\x5d\0\0\x80\0\xff\xff\xff\xff\xff\xff\xff\xff\0", "an lzma file"),
            (b"\x5d\0\0\x80\0\xff\xff\xff\xff\xff\xff\xff\0\0", "raw"),
            (b"\n <!DOCTYPE HTML>", "a web page"),
            (b"<html lang=en>", "a web page"),
            (b"<htm", "raw"),
            (b"QFI\xfb\0\0\0\x03", "qcow2"),
        ] {
            assert_eq!(names(head), name, "{head:?}");
        }
    }

    #[test]
    fn what_a_raw_disk_may_begin_with_is_raw() {
        let mut iso = vec![0; 32 << 10];
        iso.extend(b"\x01CD001");
        for head in [
            &[][..],
            b"\0",
            &[0; HEAD_BYTES],
            &[0xff; HEAD_BYTES],
            &iso,
            b"LUKS\xba\xbe\0\x02",
            b"\xeb\x63\x90\x10\x8e\xd0\xbc\0\xb0",
            b"\xeb\x52\x90NTFS    ",
            b"\xeb\x3c\x90mkfs.fat",
            b"XFSB\0\0\x10\0",
            b"hsqs",
            b"plain text",
        ] {
            assert_eq!(names(head), "raw", "{:?}", &head[..head.len().min(16)]);
        }
    }

    #[test]
    fn a_footer_counts_only_whole_and_with_its_checksum() {
        let mut vhd = [0; TAIL_BYTES];
        vhd[..8].copy_from_slice(b"conectix");
        vhd[100] = 7;
        let sum = !vhd.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        vhd[64..68].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(recognize(&[], &vhd), Kind::Image("vpc"));
        for at in [0, 64, 67, 101, 511] {
            let mut other = vhd;
            other[at] ^= 1;
            assert_eq!(recognize(&[], &other), Kind::Raw, "{at}");
        }
        assert_eq!(recognize(&[], &vhd[1..]), Kind::Raw);
        let mut dmg = [0; TAIL_BYTES];
        dmg[..12].copy_from_slice(b"koly\0\0\0\x04\0\0\x02\0");
        assert_eq!(recognize(&[], &dmg), Kind::Image("dmg"));
        dmg[7] = 5;
        assert_eq!(recognize(&[], &dmg), Kind::Raw);
    }
}
