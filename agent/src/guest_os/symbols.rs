//! A kernel's symbols as an operator has them: `System.map`, or a copy of the guest's `/proc/kallsyms`.
//!
//! Owns the text's form (`nm -n`). Must not know where the kernel lies now: address randomisation moves all symbols by as much.

/// Why a text is no list of symbols that helps.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SymbolsError {
    /// A line is none.
    #[error("line {line} is no symbol: a System.map and /proc/kallsyms have lines like `ffffffff81000000 T _text`")]
    NoSymbol {
        /// Its number, from 1.
        line: usize,
    },
    /// It is not there.
    #[error("the symbol {0} is missing: is this the System.map or /proc/kallsyms of a whole kernel?")]
    Missing(&'static str),
    /// What an unprivileged reader of `/proc/kallsyms` gets.
    #[error(
        "the addresses are all zero: copy /proc/kallsyms in the guest as root, with kernel.kptr_restrict at 0 or 1"
    )]
    Hidden,
    /// Not in the order of a kernel's image.
    #[error("init_task is not behind _text, within 1 GiB: these are not the symbols of one kernel")]
    Scattered,
}

/// Where the first task lies in a kernel's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Symbols {
    /// Of `init_task`, from `_text` on, in bytes; less than 1 GiB.
    pub(super) init_task: u64,
}

impl Symbols {
    /// Reads a list, in whatever order. Symbols of modules do not count.
    ///
    /// # Errors
    /// It is none, or not of a whole kernel.
    pub fn parse(text: &[u8]) -> Result<Self, SymbolsError> {
        let (mut start, mut init_task) = (None, None);
        for (index, line) in text.split(|&byte| byte == b'\n').enumerate() {
            let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
            let (Some(address), kind, name) = (words.next(), words.next(), words.next()) else { continue };
            let no_symbol = SymbolsError::NoSymbol { line: index + 1 };
            let (Some(address), Some(_), Some(name)) = (number(address), kind, name) else { return Err(no_symbol) };
            // Behind a symbol of a module stands the module's name.
            if words.next().is_none() {
                match name {
                    b"_text" => start = start.or(Some(address)),
                    b"init_task" => init_task = init_task.or(Some(address)),
                    _ => {}
                }
            }
        }
        let start = start.ok_or(SymbolsError::Missing("_text"))?;
        let init_task = init_task.ok_or(SymbolsError::Missing("init_task"))?;
        if start == 0 && init_task == 0 {
            return Err(SymbolsError::Hidden);
        }
        let offset = init_task.checked_sub(start).filter(|&offset| offset < 1 << 30).ok_or(SymbolsError::Scattered)?;
        Ok(Self { init_task: offset })
    }
}

/// Sixteen hexadecimal digits at most, without a sign.
fn number(word: &[u8]) -> Option<u64> {
    let fine = !word.is_empty() && word.len() <= 16 && word.iter().all(u8::is_ascii_hexdigit);
    fine.then(|| u64::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()).flatten()
}

/// Fuzzing: what is taken is an offset in an image.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(input: &[u8]) {
    if let Ok(symbols) = Symbols::parse(input) {
        assert!(symbols.init_task < 1 << 30);
    }
}

/// Fuzzing: what is right.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    [
        "0000000000000000 A fixed_percpu_data\nffffffff81000000 T _text\nffffffff81000000 T startup_64\n\
         ffffffff8260a940 D init_task\n",
        "ffffffffa0a00000 T _text\nffffffffa200a940 D init_task\nffffffffc0201000 t init_task\t[kvm]\n",
    ]
    .map(Into::into)
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_files_are_read_and_modules_are_left_out() {
        for seed in fuzz_seeds() {
            assert_eq!(Symbols::parse(&seed), Ok(Symbols { init_task: 0x160_a940 }));
        }
        let module_first =
            b"ffffffffc0201000 t init_task\t[kvm]\nffffffff81000000 T _text\nffffffff81000010 D init_task";
        assert_eq!(Symbols::parse(module_first), Ok(Symbols { init_task: 16 }));
    }

    #[test]
    fn what_is_no_list_is_refused_by_reason() {
        let of = |text: &str| Symbols::parse(text.as_bytes()).unwrap_err();
        assert_eq!(of(""), SymbolsError::Missing("_text"));
        assert_eq!(of("ffffffffffffffff B The real System.map is in a package"), SymbolsError::Missing("_text"));
        assert_eq!(of("ffffffff81000000 T _text\n"), SymbolsError::Missing("init_task"));
        assert_eq!(of("ffffffff81000000 T _text\n+fff T x"), SymbolsError::NoSymbol { line: 2 });
        assert_eq!(of("not a map"), SymbolsError::NoSymbol { line: 1 });
        assert_eq!(of("0 T _text\n0 D init_task"), SymbolsError::Hidden);
        for other in ["ffffffff80000000", "ffffffffc1000000"] {
            assert_eq!(of(&format!("ffffffff81000000 T _text\n{other} D init_task")), SymbolsError::Scattered);
        }
    }
}
