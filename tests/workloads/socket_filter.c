// Loads a BPF program that takes its time, and sends datagrams through it for as many seconds as it is told.
#include <arpa/inet.h>
#include <linux/bpf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef SO_ATTACH_BPF
#define SO_ATTACH_BPF 50
#endif

// Fewer than the kernel allows without privileges.
#define INSTRUCTIONS 4000

static int load(void) {
    static struct bpf_insn program[INSTRUCTIONS];
    // r0 = 1, multiplied by three again and again; then nothing of the datagram is kept.
    program[0] = (struct bpf_insn){.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = 1};
    for (int i = 1; i < INSTRUCTIONS - 2; i++)
        program[i] = (struct bpf_insn){.code = BPF_ALU64 | BPF_MUL | BPF_K, .dst_reg = BPF_REG_0, .imm = 3};
    program[INSTRUCTIONS - 2] = (struct bpf_insn){.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0};
    program[INSTRUCTIONS - 1] = (struct bpf_insn){.code = BPF_JMP | BPF_EXIT};
    union bpf_attr attributes;
    memset(&attributes, 0, sizeof attributes);
    attributes.prog_type = BPF_PROG_TYPE_SOCKET_FILTER;
    attributes.insns = (uintptr_t)program;
    attributes.insn_cnt = INSTRUCTIONS;
    attributes.license = (uintptr_t)"GPL";
    strcpy(attributes.prog_name, "slow_filter");
    return (int)syscall(SYS_bpf, BPF_PROG_LOAD, &attributes, sizeof attributes);
}

int main(int argc, char **argv) {
    double seconds = argc > 1 ? atof(argv[1]) : 1;
    int filter = load();
    int receiver = socket(AF_INET, SOCK_DGRAM, 0), sender = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    if (filter < 0 || bind(receiver, (struct sockaddr *)&address, sizeof address) != 0 ||
        getsockname(receiver, (struct sockaddr *)&address, &length) != 0 ||
        setsockopt(receiver, SOL_SOCKET, SO_ATTACH_BPF, &filter, sizeof filter) != 0) {
        perror("socket_filter");
        return 1;
    }
    struct timespec now, end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    do {
        for (int i = 0; i < 100; i++)
            if (sendto(sender, "x", 1, 0, (struct sockaddr *)&address, sizeof address) < 0)
                return 1;
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - end.tv_sec) + (now.tv_nsec - end.tv_nsec) / 1e9 < seconds);
    return 0;
}
