//! The configuration space, field by field, at one moment (§2.5).

use crate::{StartError, Transport};

/// A device that changes its configuration all the time is not waited for longer than this.
const TRIES: u32 = 100;

/// Reads fields one by one, as §4.1.3.1 wants it.
pub(crate) struct Fields<'t, T>(&'t mut T);

impl<T: Transport> Fields<'_, T> {
    fn bytes<const N: usize>(&mut self, offset: u32) -> Result<[u8; N], T::Error> {
        let mut bytes = [0; N];
        self.0.read_config(offset, &mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn u8(&mut self, offset: u32) -> Result<u8, T::Error> {
        self.bytes(offset).map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self, offset: u32) -> Result<u16, T::Error> {
        self.bytes(offset).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, offset: u32) -> Result<u32, T::Error> {
        self.bytes(offset).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, offset: u32) -> Result<u64, T::Error> {
        self.bytes(offset).map(u64::from_le_bytes)
    }
}

/// What `read` makes of the configuration space, if that did not change meanwhile; then it is read again.
pub(crate) fn read<T: Transport, C>(
    transport: &mut T,
    mut read: impl FnMut(&mut Fields<'_, T>) -> Result<C, T::Error>,
) -> Result<C, StartError<T::Error>> {
    let mut generation = transport.config_generation().map_err(StartError::Transport)?;
    for _ in 0..TRIES {
        let config = read(&mut Fields(transport)).map_err(StartError::Transport)?;
        let now = transport.config_generation().map_err(StartError::Transport)?;
        if now == generation {
            return Ok(config);
        }
        generation = now;
    }
    Err(StartError::Config { field: "config_generation", value: generation.into() })
}
