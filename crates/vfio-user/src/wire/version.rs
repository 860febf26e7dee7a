use super::{Command, WireError};
use serde::{Deserialize, Serialize};

/// VERSION, asking and answering.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Both sides have the same.
    pub major: u16,
    /// What the client proposes, or the lower one that the server takes.
    pub minor: u16,
    /// What the sender can do.
    pub capabilities: Capabilities,
}

/// What the sender of a version can do. What is absent has the protocol's default; what is unknown means nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// How many file descriptors it takes with one message. Absent: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_msg_fds: Option<u64>,
    /// How much data it takes with one message. Absent: 1 MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_data_xfer_size: Option<u64>,
    /// How many DMA maps may be valid at once. Absent: 65535.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_dma_maps: Option<u64>,
    /// Page sizes of DMA maps, or'ed together. Absent: 4096.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsizes: Option<u64>,
    /// A socket of their own for the server's commands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub twin_socket: Option<TwinSocket>,
    /// REGION_WRITE_MULTI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_multiple: Option<bool>,
}

/// A second socket, for what the server asks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TwinSocket {
    /// The client can have one; or the server made one.
    pub supported: bool,
    /// Which of the reply's file descriptors it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd_index: Option<u32>,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(default)]
struct Data {
    capabilities: Capabilities,
}

impl Version {
    pub(super) fn parse(body: &[u8]) -> Result<Self, WireError> {
        let ([major, minor], data) = super::head::<[u16; 2]>(Command::Version, body)?;
        let Data { capabilities } = match data {
            [] => Data::default(),
            [json @ .., 0] => {
                serde_json::from_slice(json).map_err(|error| WireError::Capabilities(error.to_string()))?
            }
            _ => return Err(WireError::Capabilities("no NUL at its end".to_owned())),
        };
        Ok(Self { major, minor, capabilities })
    }

    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = [self.major.to_ne_bytes(), self.minor.to_ne_bytes()].concat();
        let data = Data { capabilities: self.capabilities.clone() };
        serde_json::to_writer(&mut body, &data).expect("a structure of numbers is JSON");
        body.push(0);
        body
    }
}
