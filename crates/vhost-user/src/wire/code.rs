use super::WireError;

macro_rules! codes {
    ($(#[$doc:meta])* $enum:ident { $($(#[$variant_doc:meta])* $variant:ident = $number:literal $name:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum $enum {
            $(#[doc = concat!($name, ", message ", $number, ".")] $(#[$variant_doc])* $variant = $number,)*
        }

        impl $enum {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The standard's name, without its prefix.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// The number on the wire.
            pub fn number(self) -> u32 {
                self as u32
            }
        }

        impl TryFrom<u32> for $enum {
            type Error = WireError;

            fn try_from(number: u32) -> Result<Self, WireError> {
                match number {
                    $($number => Ok(Self::$variant),)*
                    _ => Err(WireError::Unknown { request: number }),
                }
            }
        }

        impl std::fmt::Display for $enum {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

codes! {
    /// What a front-end asks of a back-end.
    FrontendCode {
        GetFeatures = 1 "GET_FEATURES",
        SetFeatures = 2 "SET_FEATURES",
        SetOwner = 3 "SET_OWNER",
        ResetOwner = 4 "RESET_OWNER",
        SetMemTable = 5 "SET_MEM_TABLE",
        SetLogBase = 6 "SET_LOG_BASE",
        SetLogFd = 7 "SET_LOG_FD",
        SetVringNum = 8 "SET_VRING_NUM",
        SetVringAddr = 9 "SET_VRING_ADDR",
        SetVringBase = 10 "SET_VRING_BASE",
        GetVringBase = 11 "GET_VRING_BASE",
        SetVringKick = 12 "SET_VRING_KICK",
        SetVringCall = 13 "SET_VRING_CALL",
        SetVringErr = 14 "SET_VRING_ERR",
        GetProtocolFeatures = 15 "GET_PROTOCOL_FEATURES",
        SetProtocolFeatures = 16 "SET_PROTOCOL_FEATURES",
        GetQueueNum = 17 "GET_QUEUE_NUM",
        SetVringEnable = 18 "SET_VRING_ENABLE",
        SendRarp = 19 "SEND_RARP",
        NetSetMtu = 20 "NET_SET_MTU",
        SetBackendReqFd = 21 "SET_BACKEND_REQ_FD",
        IotlbMsg = 22 "IOTLB_MSG",
        SetVringEndian = 23 "SET_VRING_ENDIAN",
        GetConfig = 24 "GET_CONFIG",
        SetConfig = 25 "SET_CONFIG",
        CreateCryptoSession = 26 "CREATE_CRYPTO_SESSION",
        CloseCryptoSession = 27 "CLOSE_CRYPTO_SESSION",
        PostcopyAdvise = 28 "POSTCOPY_ADVISE",
        PostcopyListen = 29 "POSTCOPY_LISTEN",
        PostcopyEnd = 30 "POSTCOPY_END",
        GetInflightFd = 31 "GET_INFLIGHT_FD",
        SetInflightFd = 32 "SET_INFLIGHT_FD",
        GpuSetSocket = 33 "GPU_SET_SOCKET",
        ResetDevice = 34 "RESET_DEVICE",
        VringKick = 35 "VRING_KICK",
        GetMaxMemSlots = 36 "GET_MAX_MEM_SLOTS",
        AddMemReg = 37 "ADD_MEM_REG",
        RemMemReg = 38 "REM_MEM_REG",
        SetStatus = 39 "SET_STATUS",
        GetStatus = 40 "GET_STATUS",
        GetSharedObject = 41 "GET_SHARED_OBJECT",
        SetDeviceStateFd = 42 "SET_DEVICE_STATE_FD",
        CheckDeviceState = 43 "CHECK_DEVICE_STATE",
    }
}

codes! {
    /// What a back-end asks of a front-end, on the channel of SET_BACKEND_REQ_FD.
    BackendCode {
        IotlbMsg = 1 "BACKEND_IOTLB_MSG",
        ConfigChangeMsg = 2 "BACKEND_CONFIG_CHANGE_MSG",
        VringHostNotifierMsg = 3 "BACKEND_VRING_HOST_NOTIFIER_MSG",
        VringCall = 4 "BACKEND_VRING_CALL",
        VringErr = 5 "BACKEND_VRING_ERR",
        SharedObjectAdd = 6 "BACKEND_SHARED_OBJECT_ADD",
        SharedObjectRemove = 7 "BACKEND_SHARED_OBJECT_REMOVE",
        SharedObjectLookup = 8 "BACKEND_SHARED_OBJECT_LOOKUP",
    }
}
