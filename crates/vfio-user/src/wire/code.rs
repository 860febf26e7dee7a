use std::fmt;

macro_rules! commands {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// The protocol's commands.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Command {
            $($(#[$doc])* $name = $number,)*
        }

        impl Command {
            /// Every command.
            pub const ALL: &[Command] = &[$(Command::$name),*];

            /// The command of that number.
            pub fn from_number(number: u16) -> Option<Self> {
                match number {
                    $($number => Some(Command::$name),)*
                    _ => None,
                }
            }

            /// Its name in the protocol, without `VFIO_USER_`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Command::$name => $text,)*
                }
            }
        }
    };
}

commands! {
    /// The first of all: which protocol, and what both sides can do.
    Version = 1, "VERSION";
    /// Grants memory.
    DmaMap = 2, "DMA_MAP";
    /// Takes memory back.
    DmaUnmap = 3, "DMA_UNMAP";
    /// What kind of device it is.
    DeviceGetInfo = 4, "DEVICE_GET_INFO";
    /// What a region is like.
    DeviceGetRegionInfo = 5, "DEVICE_GET_REGION_INFO";
    /// Which parts of a region are rung by eventfd.
    DeviceGetRegionIoFds = 6, "DEVICE_GET_REGION_IO_FDS";
    /// What an interrupt type is like.
    DeviceGetIrqInfo = 7, "DEVICE_GET_IRQ_INFO";
    /// Sets interrupts up.
    DeviceSetIrqs = 8, "DEVICE_SET_IRQS";
    /// Reads registers.
    RegionRead = 9, "REGION_READ";
    /// Writes registers.
    RegionWrite = 10, "REGION_WRITE";
    /// The server reads memory that it can't map.
    DmaRead = 11, "DMA_READ";
    /// The server writes memory that it can't map.
    DmaWrite = 12, "DMA_WRITE";
    /// Resets the device.
    DeviceReset = 13, "DEVICE_RESET";
    /// Of an earlier form of migration.
    DirtyPages = 14, "DIRTY_PAGES";
    /// Many register writes at once.
    RegionWriteMulti = 15, "REGION_WRITE_MULTI";
    /// Features of the device beyond its registers, all about migration.
    DeviceFeature = 16, "DEVICE_FEATURE";
    /// Migration.
    MigDataRead = 17, "MIG_DATA_READ";
    /// Migration.
    MigDataWrite = 18, "MIG_DATA_WRITE";
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
