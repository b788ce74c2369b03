/* A program that opens VFIO's nodes by itself, as its arguments say, one step each; it says what
 * came of every one. Numbers in steps are those of its own opens, from 0 on.
 *
 *   open:PATH        rdonly:PATH     openat:DIRECTORY:NAME   cwd:DIRECTORY:NAME   openat2:PATH
 *   close:N          same:A:B        container:G:C           iommu:C:TYPE         unset:G
 *   status:G         device:G:BDF    thread:STEP             fork:STEP            leave:STEP
 *   say:TEXT         wait            dumpable:0|1            exit:STATUS          kill:SIGNAL
 *   trace            looks into its parent
 *   beside:STEP      in a thread that is not waited for
 *   exec: the steps that follow are a new program's
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int files[64], count;

static void report(const char *step, int result, const char *what)
{
	if (result < 0)
		printf("%s: %s\n", step, strerrorname_np(errno));
	else
		printf("%s: %s\n", step, what);
	fflush(stdout);
}

static void opened(const char *step, int fd)
{
	char link[64], target[256] = "";
	struct stat st;

	if (fd >= 0) {
		files[count++] = fd;
		snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
		if (readlink(link, target, sizeof target - 1) < 0 || fstat(fd, &st) < 0)
			target[0] = 0;
		else if (S_ISSOCK(st.st_mode))
			strcpy(target, "simulated");
		if (fcntl(fd, F_GETFD) & FD_CLOEXEC)
			strcat(target, " cloexec");
	}
	report(step, fd, target);
}

static void step(const char *text);

static void *in_thread(void *text)
{
	step(text);
	return NULL;
}

static void step(const char *text)
{
	char word[16] = "", a[128] = "", b[128] = "";
	const char *rest = strchr(text, ':');
	int n = rest ? (int)(rest - text) : (int)strlen(text), m;

	snprintf(word, sizeof word, "%.*s", n, text);
	if (rest) {
		const char *colon = strchr(++rest, ':');
		snprintf(a, sizeof a, "%.*s", colon ? (int)(colon - rest) : 127, rest);
		snprintf(b, sizeof b, "%s", colon ? colon + 1 : "");
	}
	n = files[atoi(a) & 63], m = files[atoi(b) & 63];
	if (!strcmp(word, "open")) {
#ifdef SYS_open
		opened(text, syscall(SYS_open, rest, O_RDWR | O_CLOEXEC));
#else
		opened(text, open(rest, O_RDWR | O_CLOEXEC));
#endif
	} else if (!strcmp(word, "rdonly")) {
		opened(text, open(rest, O_RDONLY));
	} else if (!strcmp(word, "openat")) {
		int directory = open(a, O_PATH | O_DIRECTORY);
		opened(text, openat(directory, b, O_RDWR));
		close(directory);
	} else if (!strcmp(word, "cwd")) {
		if (chdir(a) == 0)
			opened(text, open(b, O_RDWR));
	} else if (!strcmp(word, "openat2")) {
		unsigned long long how[3] = { O_RDWR | O_CLOEXEC, 0, 0 };
		opened(text, syscall(437, AT_FDCWD, rest, how, sizeof how));
	} else if (!strcmp(word, "close")) {
		report(text, close(n), "closed");
	} else if (!strcmp(word, "container")) {
		report(text, ioctl(n, 0x3b68, &m), "done");
	} else if (!strcmp(word, "iommu")) {
		report(text, ioctl(n, 0x3b66, atol(b)), "done");
	} else if (!strcmp(word, "unset")) {
		report(text, ioctl(n, 0x3b69), "done");
	} else if (!strcmp(word, "status")) {
		unsigned status[2] = { sizeof status, 0 };
		int result = ioctl(n, 0x3b67, status);
		report(text, result, status[1] & 2 ? "attached" : "free");
	} else if (!strcmp(word, "device")) {
		opened(text, ioctl(n, 0x3b6a, b));
	} else if (!strcmp(word, "same")) {
		struct stat one, other;
		if (fstat(n, &one) < 0 || fstat(m, &other) < 0)
			report(text, -1, "");
		else
			report(text, 0, one.st_ino == other.st_ino ? "yes" : "no");
	} else if (!strcmp(word, "thread")) {
		pthread_t thread;
		pthread_create(&thread, NULL, in_thread, (void *)rest);
		pthread_join(thread, NULL);
	} else if (!strcmp(word, "fork")) {
		pid_t child = fork();
		if (child == 0) {
			step(rest);
			_exit(0);
		}
		waitpid(child, NULL, 0);
	} else if (!strcmp(word, "leave")) {
		/* A child that is still there when this program has ended. */
		if (fork() == 0) {
			char line[16];
			setsid();
			if (read(0, line, sizeof line) >= 0)
				step(rest);
			_exit(0);
		}
	} else if (!strcmp(word, "beside")) {
		pthread_t thread;
		pthread_create(&thread, NULL, in_thread, (void *)rest);
	} else if (!strcmp(word, "dumpable")) {
		prctl(PR_SET_DUMPABLE, atoi(a), 0, 0, 0);
	} else if (!strcmp(word, "trace")) {
		report(text, ptrace(PTRACE_SEIZE, getppid(), 0, 0), "attached");
	} else if (!strcmp(word, "say")) {
		printf("%s\n", rest);
		fflush(stdout);
	} else if (!strcmp(word, "wait")) {
		char line[16];
		if (read(0, line, sizeof line) < 0)
			exit(2);
	} else if (!strcmp(word, "exit")) {
		exit(atoi(a));
	} else if (!strcmp(word, "kill")) {
		kill(getpid(), atoi(a));
	} else {
		printf("%s: no such step\n", text);
		exit(2);
	}
}

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "exec")) {
			argv[i] = argv[0];
			execv("/proc/self/exe", argv + i);
			perror("exec");
			return 2;
		}
		step(argv[i]);
	}
	return 0;
}
