# The way in, AT&T syntax: QEMU starts us in 32-bit protected mode without paging, as
# Xen's PVH says, and leaves us here in 64-bit mode with all memory below 4 GiB mapped
# to itself and SSE switched on.

    .section .note.pvh, "a", @note
    .balign 4
    .long 4                     # length of the name
    .long 8                     # length of the address: QEMU reads as much in a 64-bit file
    .long 18                    # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad start

    .section .text.start, "ax"
    .code32
    .globl start
start:
    cli
    cld
    movl $stack_end, %esp
    movl %ebx, start_info       # memory.rs

    movl $directories, %edi     # 4 GiB as 2048 pages of 2 MiB: present, writable, large
    movl $0x83, %eax
    movl $2048, %ecx
1:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    loop 1b
    movl $pointers, %edi        # 4 directories
    movl $directories + 3, %eax
    movl $4, %ecx
1:  movl %eax, (%edi)
    addl $4096, %eax
    addl $8, %edi
    loop 1b
    movl $pointers + 3, top

    movl $tss, %eax             # the descriptor of the task state wants its address in pieces
    movw %ax, tss_descriptor + 2
    shrl $16, %eax
    movb %al, tss_descriptor + 4
    movb %ah, tss_descriptor + 7

    movl $top, %eax
    movl %eax, %cr3
    movl $0x620, %eax           # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xc0000080, %ecx      # EFER
    rdmsr
    orl $0x100, %eax            # LME
    wrmsr
    movl $0x80000033, %eax      # PG, NE, ET, MP, PE
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $1f

    .code64
1:  movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $24, %eax
    ltr %ax
    movl $stack_end, %esp
    xorl %ebp, %ebp
    call boot                   # lib.rs

# Exceptions: each pushes its number and meets the others. They do not return.
    .balign 16
    .globl exceptions
exceptions:
    .set number, 0
    .rept 32
    .balign 16
    pushq $number
    jmp 1f
    .set number, number + 1
    .endr
1:  movq (%rsp), %rdi
    leaq 8(%rsp), %rsi
    movq %cr2, %rdx
    andq $-16, %rsp
    call exception              # traps.rs

# The timer: counts down, and does not return when the time is up.
    .globl tick
tick:
    pushq %rax
    movb $0x20, %al             # end of interrupt
    outb %al, $0x20
    decl ticks_left             # watchdog.rs
    jz 1f
    popq %rax
    iretq
1:  andq $-16, %rsp
    call time_is_up             # watchdog.rs

    .section .data
    .balign 8
gdt:
    .quad 0
    .quad 0x00af9a000000ffff    # 8: 64-bit code
    .quad 0x00cf92000000ffff    # 16: data
tss_descriptor:                 # 24: task state, of 104 bytes
    .quad 0x0000890000000067
    .quad 0
gdt_pointer:
    .word . - gdt - 1
    .quad gdt

# Interrupts have a stack of their own: below ours, compiled code may keep data.
    .balign 16
tss:
    .skip 36
    .quad interrupt_stack_end   # IST1
    .skip 60

    .section .bss
    .balign 4096
top:
    .skip 4096
pointers:
    .skip 4096
directories:
    .skip 4 * 4096
    .skip 65536
stack_end:
    .skip 16384
interrupt_stack_end:
