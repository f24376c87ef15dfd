//! A small mutator: seeds in, bytes that are nearly as good out. The same number gives the same bytes everywhere.

/// Numbers at which code goes wrong.
const INTERESTING: [u64; 14] =
    [0, 1, 7, 8, 27, 32, 255, 4096, 65_535, 1 << 20, (1 << 31) - 1, 1 << 32, u64::MAX >> 1, u64::MAX - 511];
/// Inputs grow no longer than this, in bytes.
const MAX_BYTES: usize = 128 << 10;
/// How much is repeated or taken out at most, in bytes.
const MAX_STRETCH_BYTES: usize = 256;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, or 0 if that is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).unwrap()
    }
}

/// One seed, changed in one to five places.
pub fn mutated(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(5) {
        change(&mut bytes, seeds, random);
    }
    bytes.truncate(MAX_BYTES);
    bytes
}

fn change(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    let at = random.below(bytes.len());
    let stretch = random.below((bytes.len() - at).min(MAX_STRETCH_BYTES) + 1);
    match random.below(10) {
        0..=1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        2 => {
            let new = random.next().to_le_bytes()[0];
            if let Some(byte) = bytes.get_mut(at) {
                *byte = new;
            }
        }
        3..=4 => put_number(bytes, at, random),
        5 => bytes.truncate(at),
        6 => drop(bytes.drain(at..at + stretch)),
        7 => {
            let copy = bytes[at..at + stretch].to_vec();
            let to = random.below(bytes.len() + 1);
            bytes.splice(to..to, copy);
        }
        8 => {
            let other = &seeds[random.below(seeds.len())];
            bytes.truncate(at);
            bytes.extend_from_slice(&other[random.below(other.len())..]);
        }
        _ => put_digits(bytes, at, random),
    }
}

/// Overwrites 1, 2, 4 or 8 bytes, in either byte order.
fn put_number(bytes: &mut [u8], at: usize, random: &mut Random) {
    let number = INTERESTING[random.below(INTERESTING.len())].wrapping_add(random.next() % 3).wrapping_sub(1);
    let width = 1 << random.below(4);
    let mut raw = number.to_le_bytes()[..width].to_vec();
    if random.below(2) == 0 {
        raw.reverse();
    }
    for (byte, new) in bytes[at..].iter_mut().zip(raw) {
        *byte = new;
    }
}

/// Replaces the decimal number nearest behind `at`, for formats that people can read.
fn put_digits(bytes: &mut Vec<u8>, at: usize, random: &mut Random) {
    let Some(start) = bytes[at..].iter().position(u8::is_ascii_digit).map(|found| at + found) else { return };
    let len = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let number = INTERESTING[random.below(INTERESTING.len())].wrapping_add(random.next() % 3).wrapping_sub(1);
    bytes.splice(start..start + len, number.to_string().into_bytes());
}
