use crate::sys;
use std::fs::File;
use std::io::{self, Read};
use std::time::Duration;

/// An MSI-X vector of a function, as an eventfd.
#[derive(Debug)]
pub struct Vector(File);

impl Vector {
    /// The vectors 0 to `count` of a function, which is on the bus no earlier than its driver has it.
    pub(crate) fn all(device: &File, count: usize) -> io::Result<Vec<Self>> {
        let vectors = (0..count).map(|_| sys::eventfd().map(Self)).collect::<io::Result<Vec<_>>>()?;
        sys::set_vectors(device, &vectors.iter().map(|Self(file)| file).collect::<Vec<_>>())?;
        Ok(vectors)
    }

    /// Waits until the device has sent this interrupt since the last time; `false`: it has not, for so long.
    ///
    /// # Errors
    /// Those of poll. A signal is no error, and is as if the interrupt had come: whoever waits looks again.
    pub fn wait(&self, patience: Duration) -> io::Result<bool> {
        let milliseconds = patience.as_millis().try_into().unwrap_or(libc::c_int::MAX);
        match sys::is_readable(&self.0, milliseconds) {
            Ok(true) => {
                // How often does not matter, and nobody else reads.
                let _ = (&self.0).read(&mut [0; 8]);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn an_interrupt_that_came_before_is_not_lost_and_counts_once() {
        let vector = Vector(sys::eventfd().unwrap());
        assert!(!vector.wait(Duration::ZERO).unwrap());
        for _ in 0..3 {
            (&vector.0).write_all(&1_u64.to_ne_bytes()).unwrap();
        }
        assert!(vector.wait(Duration::from_secs(60)).unwrap());
        assert!(!vector.wait(Duration::ZERO).unwrap());
    }

    #[test]
    fn a_function_that_is_none_has_no_vectors() {
        let file = sys::eventfd().unwrap();
        assert!(Vector::all(&file, 1).is_err());
        let error = Vector::all(&file, sys::MOST_VECTORS + 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
